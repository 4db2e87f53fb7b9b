"""Prepares a token store from text keyed by user, with Ray Data.

    result = prepare(config.data, tokenizer="gpt2")
    print(result.to_text())
    TokenStore.open(result.path, verify=True)

1. Ray Data reads the input as a stream: CSV by its own reader, parquet, JSON lines and Hugging Face
   datasets by a `Datasource` over `data/read.py`, which says why.
2. Batches of rows are tokenized in parallel.
3. As blocks of examples appear, tasks split them into one object for each group of shards. A user's
   shard follows from the user's own hash; Ray only decides which task writes it.
4. One task for each group gets its objects of all blocks, and sorts and writes its shards one after
   the other. It returns the shards' checksums and counts.
5. The driver writes the manifests, and the store gets its name or its URL's manifest.

So the store does not depend on the order of rows, their files or the parallelism, and the driver
reads no row and no shard. Memory is bounded: what waits for step 4 is in Ray's object store, which
writes to the nodes' disks what has no room, and the number of groups grows with the input. An
object that is lost with its node is made again from its pieces.

Steps 3 and 4 are a shuffle in two stages [1]. Ray Data's own keyed repartition is not used: it
starts an actor and several processes for each stage, which took as much time as the shuffled rows.

Reference:
    [1] Luan et al. 2023, "Exoshuffle: An Extensible Shuffle Architecture", arXiv:2203.05072.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.data import Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.context import DataContext

from udp_ray.config.experiment import DataConfig
from udp_ray.console import Display, current, progress
from udp_ray.data.build import (
    PATH,
    BuildSettings,
    Origin,
    StageResults,
    count_groups,
    describe_counts,
    describe_input,
    describe_store,
    estimate,
    finish,
    read_pieces,
    split_by_shard,
    tokenize_batch,
    write_group,
)
from udp_ray.data.hashing import hash_user
from udp_ray.data.read import (
    CSV_PARSE,
    CSV_READ,
    UNREADABLE,
    Columns,
    Piece,
    column_names,
    csv_conversion,
    file_system,
    find_pieces,
    join_adjacent,
    refuse_unreadable,
    require_columns,
)
from udp_ray.data.remote import cache_folder, discard, put_store, refuse_occupied
from udp_ray.data.store import Manifest, PrivateCounts, rename_into_place
from udp_ray.data.tokenize import Placement, TextEncoder
from udp_ray.errors import ConfigError, DataError
from udp_ray.imports import quick_imports
from udp_ray.io import is_url, obstacle, vanishes_with_job, writing
from udp_ray.ledger.database import parse_url, public_url
from udp_ray.models.positions import require_positions
from udp_ray.on_ray.cluster import connecting
from udp_ray.on_ray.tasks import causes_of, own_error, quiet_ray_data
from udp_ray.runs.registration import Registration, registered, require_ledger

_PIECE_BYTES = 4 << 20
_TASK_BYTES = 64 << 20
_MOST_TASKS = 4096
_BLOCK_BYTES = 32 << 20
_SPLIT_BYTES = 32 << 20
"""Examples that are split at once, so that a part has hundreds of kilobytes. Objects of less than
100 kB are kept in the driver's memory."""
_CANCEL_S = 10.0
_PACKAGES = ("udp-ray", "ray", "pyarrow", "tokenizers", "transformers", "numpy")


@dataclass(frozen=True)
class Input:
    """What will be read."""

    pieces: list[Piece]
    heldout_pieces: list[Piece]
    columns: Columns

    @property
    def all_pieces(self) -> list[Piece]:
        """The pieces of both."""
        return [*self.pieces, *self.heldout_pieces]

    @property
    def parts(self) -> list[tuple[list[Piece], Columns, bool]]:
        """Both inputs: pieces, their columns, and whether they are held out."""
        return [
            (self.pieces, self.columns, False),
            (self.heldout_pieces, self.columns.without_order(), True),
        ]

    @property
    def num_bytes(self) -> int:
        """Size of the input, of parquet before compression. Public, as sizes of files are."""
        return sum(piece.num_bytes for piece in self.all_pieces)


@dataclass(frozen=True)
class PrepareResult:
    """A store that was prepared."""

    place: str
    """Folder or URL."""
    manifest: Manifest
    counts: PrivateCounts
    """Sensitive."""
    is_new_ledger: bool

    @property
    def path(self) -> Path:
        """The folder, of a store that lies in one."""
        return Path(self.place)

    def to_text(self, *, show_counts: bool = False) -> str:
        """Returns what may be said of the store; says so if it has a new ledger.

        Args:
            show_counts: Add the private totals and the histogram of examples per user.
        """
        text = describe_store(self.place, self.manifest)
        if self.is_new_ledger:
            text += (
                "\nthis ledger is NEW and knows of no earlier spending: if models were trained on"
                " these users' text before, prepare again with data.ledger naming the ledger of"
                " those runs"
            )
        return f"{text}\n{describe_counts(self.counts)}" if show_counts else text


# ---- what can be checked before a cluster starts


def find_input(data: DataConfig) -> Input:
    """Returns what there is to read, after looking at the first file of each input.

    Raises:
        DataError: If nothing matches, a file cannot be read, or a column is missing.
    """
    if not data.input:
        raise DataError("data.input is missing: name the files to read")
    columns = Columns(
        user=data.user_column,
        text=data.response_column or data.text_column,
        prompt=data.prompt_column,
        order=data.order_column,
    )
    heldout = data.heldout if isinstance(data.heldout, list) else []
    return Input(
        _find_pieces("data.input", data.input, data.input_split, columns),
        _find_pieces("data.heldout", heldout, data.input_split, columns.without_order()),
        columns,
    )


def _find_pieces(field: str, inputs: list[str], split: str, columns: Columns) -> list[Piece]:
    try:
        pieces = find_pieces(inputs, split, _PIECE_BYTES)
        # Ray Data reads a column that a parquet file lacks as nulls, so each of these is checked.
        # Of the others the first is; the rest are checked by the tasks that read them.
        for number, piece in enumerate(pieces):
            names = column_names(piece) if piece.schema is not None or number == 0 else []
            if names:
                require_columns(names, columns.names, piece.location)
    except DataError as error:
        raise DataError(f"{field}: {error}") from None
    if inputs and not pieces:
        raise DataError(f"{field} has no rows: {', '.join(inputs)}; give files with text")
    return pieces


def require_usable(
    data: DataConfig, *, tokenizer: str, model: str | None
) -> tuple[TextEncoder, Input]:
    """Returns the encoder and what there is to read, after all checks that need no cluster.

    Only whether the store's place is free is left to `refuse_existing`.

    Args:
        data: The settings.
        tokenizer: Name or folder of the tokenizer.
        model: Name or folder of the model that will be trained, if it is known.

    Raises:
        UdpRayError: If the settings or the input cannot be used.
    """
    require_ledger(data.ledger_url)
    return load_encoder(tokenizer, data.block_tokens, model), find_input(data)


def dry_run_text(data: DataConfig, *, tokenizer: str, model: str | None = None) -> str:
    """Returns what `prepare` would do. Touches nothing, and starts no cluster.

    Raises:
        UdpRayError: What `prepare` would raise before it starts to read.
    """
    parse_url(data.ledger_url)
    refuse_existing(data.store)
    encoder, found = require_usable(data, tokenizer=tokenizer, model=model)
    lines = describe_input(found.all_pieces, found.columns)
    lines.append(
        f"tokenizer: {tokenizer}, {encoder.info.vocab_size:,} tokens; examples of at most"
        f" {data.block_tokens} tokens"
    )
    if data.is_packed:
        order = f"column {data.order_column!r}" if data.order_column else "a keyed hash"
        lines.append(f"packing: texts of one user are joined, in the order of {order}")
    if isinstance(data.heldout, float):
        lines.append(f"held out: {data.heldout:g} of the users, by a hash of the user")
    elif data.heldout:
        lines.append(f"held out: {', '.join(data.heldout)}")
    lines.append(f"would make: {data.store} ({data.num_shards} shards)")
    lines.append(f"ledger: {public_url(data.ledger_url)}")
    lines += estimate(found.num_bytes, data.num_shards, encoder.token_type.itemsize)
    return "\n".join(lines)


def refuse_existing(place: str) -> None:
    """Refuses to prepare into a place with something in it, or into one that does not last.

    Raises:
        DataError: If it is such a place.
    """
    if is_url(place):
        refuse_occupied(place)
        return
    path = Path(place)
    if vanishes_with_job(path):
        raise DataError(
            f"data.store {path} lies in a job's temporary package directory and would vanish with"
            " the job: give an absolute path that all nodes reach"
        )
    if (reason := obstacle("the store", path)) is not None:
        raise DataError(f"data.store {path} cannot be made, {reason}: choose another folder")
    if path.is_dir() and any(path.iterdir()):
        raise DataError(f"data.store {path} is not empty: choose another folder, or remove it")


def load_encoder(tokenizer: str, block_tokens: int, model: str | None) -> TextEncoder:
    """Returns the encoder of a tokenizer; checks the positions of the model, if it is known."""
    # Imported here, and with it transformers and torch: meanwhile `prepare` starts the cluster.
    with quick_imports():
        from udp_ray.models.hub import load_tokenizer, model_config, tokenizer_fingerprint

    loaded = load_tokenizer(tokenizer)
    config = None
    if model is not None:
        with suppress(ConfigError):  # a tokenizer may be there without its model
            config = model_config(model)
    if model is not None and config is not None:
        require_positions(model, config, block_tokens)
    fingerprint = tokenizer_fingerprint(loaded)
    return TextEncoder.of(
        loaded, name=tokenizer, fingerprint=fingerprint, block_tokens=block_tokens
    )


# ---- preparing


def prepare(
    data: DataConfig,
    *,
    tokenizer: str,
    model: str | None = None,
    address: str | None = None,
    never_held_out: Sequence[str] = (),
) -> PrepareResult:
    """Prepares the store of `data`; it appears whole, or not at all.

    Args:
        data: The settings.
        tokenizer: Name or folder of the tokenizer.
        model: Name or folder of the model that will be trained, if it is known; its positions bound
            the length of examples.
        address: Ray cluster to join.
        never_held_out: Ids of synthetic users that a fraction `data.heldout` must not select, as an
            audit's canaries. Of other users' ids this would bias the held-out part.

    Raises:
        UdpRayError: If the settings or the input cannot be used; nothing is left behind.
    """
    parse_url(data.ledger_url)
    refuse_existing(data.store)
    with progress("checking the input") as display:
        require_ledger(data.ledger_url)
        found = find_input(data)
        with connecting(address, is_early=True) as connect:
            display.phase("loading the tokenizer")
            encoder = load_encoder(tokenizer, data.block_tokens, model)
            connect()
            return _prepare(data, encoder, found, never_held_out, display)


def _prepare(
    data: DataConfig,
    encoder: TextEncoder,
    found: Input,
    never_held_out: Sequence[str],
    display: Display,
) -> PrepareResult:
    with (
        registered(data.name, data.ledger_url) as registration,
        _temporary_folder(data) as folder,
    ):
        settings = BuildSettings(
            columns=found.columns,
            encoder=encoder,
            placement=Placement(
                registration.user_hash_key,
                data.num_shards,
                data.heldout if isinstance(data.heldout, float) else 0.0,
                frozenset(hash_user(registration.user_hash_key, user) for user in never_held_out),
            ),
            max_examples_per_user=data.max_examples_per_user,
            folder=folder,
            has_heldout_input=bool(found.heldout_pieces),
            url=data.store if is_url(data.store) else None,
            pack=data.is_packed,
        )
        display.phase("reading, tokenizing and shuffling")
        results = run_stages(found, settings)
        display.phase("verifying")
        manifest, counts = finish(settings, results, _origin(data, found, registration))
        registration.confirm(manifest.digest())
        if settings.url is None:
            rename_into_place(folder, Path(data.store))
        else:
            display.phase("uploading the manifest")
            put_store(folder, settings.url)
    return PrepareResult(data.store, manifest, counts, registration.is_new_ledger)


# ---- the stages, on Ray


def run_stages(found: Input, settings: BuildSettings) -> StageResults:
    """Executes the stages on workers; returns what they wrote.

    Raises:
        UdpRayError: What a worker refused, without Ray's wrapping.
    """
    results = StageResults()
    num_cores = count_cores()
    try:
        with quiet_ray_data(target_max_block_size=_BLOCK_BYTES):
            blocks = _blocks(_examples(found, settings))
            groups = count_groups(found.num_bytes, settings.num_shards, num_cores)
            parts = _split(blocks, groups, most=num_cores)
        current().phase("writing shards", total=settings.num_shards, unit="shard")
        with closing(_written_shards(parts, settings)) as rows:
            for row in rows:
                results.add(row)
                current().advance(len(results.shards))
    except Exception as error:
        raise _own_error(error, found) from None
    return results


def _examples(found: Input, settings: BuildSettings) -> Dataset:
    # Not fn_kwargs: Ray may export those, field by field, and the settings hold the hash key.
    examples = [
        rows.map_batches(
            partial(tokenize_batch, settings=settings, is_heldout_input=is_heldout_input),
            batch_size=None,
            batch_format="pyarrow",
        )
        for pieces, columns, is_heldout_input in found.parts
        for rows in read_datasets(pieces, columns)
    ]
    return reduce(Dataset.union, examples)


def _blocks(examples: Dataset) -> Iterator[tuple[ray.ObjectRef, int]]:
    """Yields blocks as Ray Data makes them, with their bytes."""
    for bundle in examples.iter_internal_ref_bundles():
        for reference, about in zip(bundle.block_refs, bundle.metadata, strict=True):
            if about.num_rows:
                yield reference, about.size_bytes or 0


def _split(
    blocks: Iterator[tuple[ray.ObjectRef, int]], groups: int, most: int
) -> list[list[ray.ObjectRef]]:
    """Splits blocks as they appear, several at once; returns the parts of each group.

    Args:
        blocks: The blocks and their bytes.
        groups: How many groups of shards; the rows of counts are one more.
        most: Splits that may wait or run; their blocks are not given back to Ray Data yet.
    """
    split = ray.remote(split_by_shard).options(num_returns=groups + 1)
    parts: list[list[ray.ObjectRef]] = [[] for _ in range(groups + 1)]
    running: list[ray.ObjectRef] = []
    gathered: list[ray.ObjectRef] = []
    num_bytes = 0

    def submit() -> None:
        made = split.remote(*gathered, num_groups=groups)
        for of_group, part in zip(parts, made, strict=True):
            of_group.append(part)
        running.append(made[0])
        gathered.clear()

    for block, size in blocks:
        gathered.append(block)
        num_bytes += size
        if num_bytes >= _SPLIT_BYTES:
            submit()
            num_bytes = 0
            if len(running) > most:
                _, running = ray.wait(running, fetch_local=False)
    if gathered:
        submit()
    return [of_group for of_group in parts if of_group]


def _written_shards(
    parts: list[list[ray.ObjectRef]], settings: BuildSettings
) -> Generator[dict[str, Any], None, None]:
    """Writes the shards of each group, given its parts; yields the rows of `write_group`."""
    write, shared = ray.remote(write_group), ray.put(settings)
    running = [write.remote(shared, *of_group) for of_group in parts]
    parts.clear()  # so that a part is freed as soon as it is written
    try:
        while running:
            (done,), running = ray.wait(running)
            yield from ray.get(done).to_pylist()
    finally:  # none may write into a folder that is being removed
        for task in running:
            ray.cancel(task)
        if running:
            ray.wait(running, num_returns=len(running), timeout=_CANCEL_S)


def read_datasets(pieces: Sequence[Piece], columns: Columns) -> list[Dataset]:
    """Returns Ray datasets of the columns, and of the path of each row's file where there is one.

    One for each format, file system and combination of column types: Ray Data merges no types.
    """
    alike: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        url = urlsplit(piece.location) if "://" in piece.location else None
        place = url and (url.scheme, url.netloc, url.query)
        schema = piece.schema
        types = schema and tuple(str(schema.field(name).type) for name in columns.names)
        name = piece.location if piece.kind in ("hub", "disk") else None
        alike.setdefault((piece.kind, name, place, types), []).append(piece)
    return [_read(some, columns) for some in alike.values()]


def _read(pieces: Sequence[Piece], columns: Columns) -> Dataset:
    if pieces[0].kind != "csv":
        runs = divide_pieces(pieces, count_cores())
        return ray.data.read_datasource(
            PieceDatasource(runs, columns), override_num_blocks=len(runs)
        )
    return ray.data.read_csv(
        paths=[file_system(piece.location)[1] for piece in pieces],
        filesystem=file_system(pieces[0].location)[0],
        partitioning=None,
        include_paths=PATH not in columns.names,
        read_options=CSV_READ,
        parse_options=CSV_PARSE,
        convert_options=csv_conversion(columns.names),
    )


def count_cores() -> int:
    """Returns how many cores the cluster has."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def divide_pieces(pieces: Sequence[Piece], num_cores: int) -> list[list[Piece]]:
    """Divides pieces into runs, of which each is the work of one task; long runs first.

    A core waits some 0.2 s for its next task, so tasks should be long; but all cores should end
    together, so the last ones are short (guided self-scheduling: Polychronopoulos and Kuck 1987,
    "Guided Self-Scheduling: A Practical Scheduling Scheme for Parallel Supercomputers").

    Args:
        pieces: In their order.
        num_cores: Cores that read at once.

    Returns:
        Runs of at least one piece, of at most 64 MiB or a 4,096th of the whole.
    """
    sizes = [piece.num_bytes or _PIECE_BYTES for piece in pieces]  # of some it is not known
    left = sum(sizes)
    most = max(_TASK_BYTES, left // _MOST_TASKS)
    runs: list[list[Piece]] = []
    room = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if size > room:
            runs.append([])
            room = min(most, left // (2 * num_cores))
        runs[-1].append(piece)
        room -= size
        left -= size
    return runs


class PieceDatasource(Datasource):
    """Has Ray Data read parquet, JSON lines and Hugging Face datasets, some pieces in each task."""

    def __init__(self, runs: Sequence[Sequence[Piece]], columns: Columns) -> None:
        """Takes the pieces of each task."""
        super().__init__()
        self._runs = runs
        self._columns = columns

    def estimate_inmemory_data_size(self) -> int:
        """Returns the size of the pieces."""
        return sum(piece.num_bytes for run in self._runs for piece in run)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Returns a task for each run of pieces."""
        tasks = []
        for run in self._runs:
            metadata = BlockMetadata(
                num_rows=None,
                size_bytes=sum(piece.num_bytes for piece in run),
                input_files=[piece.location for piece in run],
                exec_stats=None,
            )
            read = partial(read_pieces, join_adjacent(run), self._columns)
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _own_error(error: BaseException, found: Input) -> BaseException:
    """Returns our error from inside those that Ray has wrapped around it, or says what went wrong.

    Where a reader of Ray's failed, the files are looked at for the one that cannot be read.
    """
    if (ours := own_error(error)) is not None:
        return ours
    *_, innermost = causes_of(error)
    if isinstance(innermost, UNREADABLE):
        try:
            for pieces, columns, _ in found.parts:
                refuse_unreadable(pieces, columns)
        except DataError as refusal:
            return refusal
    return error


def _origin(data: DataConfig, found: Input, registration: Registration) -> Origin:
    source = {"input": ", ".join(data.input), "user_column": found.columns.user}
    source["text_column"] = found.columns.text
    if found.columns.prompt:
        source["prompt_column"] = found.columns.prompt
    if found.columns.order:
        source["order_column"] = found.columns.order
    if data.heldout is not None:
        heldout = data.heldout
        source["heldout"] = ", ".join(heldout) if isinstance(heldout, list) else f"{heldout:g}"
    if data.max_examples_per_user is not None:
        source["max_examples_per_user"] = str(data.max_examples_per_user)
    return Origin(
        name=data.name,
        ledger_id=registration.ledger_id,
        ledger_url=registration.public_url,
        source=source,
        created_by={package: version(package) for package in _PACKAGES},
    )


@contextmanager
def _temporary_folder(data: DataConfig) -> Iterator[Path]:
    """Makes a folder for the owner only, next to the store or, if that is a URL, on this node.

    It is removed afterwards unless renamed, and so is what an unfinished store left at its URL.
    """
    path = cache_folder(data.cache) / data.name if is_url(data.store) else Path(data.store)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with writing("the store", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    try:
        yield folder
    except BaseException:
        if is_url(data.store):
            discard(data.store)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
