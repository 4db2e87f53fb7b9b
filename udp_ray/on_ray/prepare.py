"""Text keyed by user -> a token store, with Ray Data: streaming, bounded in memory, deterministic.

Pieces of the input are read and tokenized in parallel; a keyed repartition brings each shard's
examples together; each shard is sorted and written by one task. The shard is ours to choose (by
the user's own hash), the partitioner only decides which task writes it, so the store does not
depend on the order of rows, their files, or the parallelism. The repartition goes over the nodes'
disks, not through memory.

    prepared = prepare(config.data, tokenizer="gpt2")
    TokenStore.open(prepared.path, verify=True)
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import ray
from ray.data.context import DataContext, ShuffleStrategy
from ray.exceptions import RayTaskError

from udp_ray.config.experiment import DataConfig
from udp_ray.console import current, progress
from udp_ray.data.build import (
    REFUSED,
    Origin,
    Task,
    collect,
    describe_input,
    describe_store,
    estimate,
    finish,
    read_examples,
    write_shards,
)
from udp_ray.data.read import Columns, Piece, column_names, find_pieces, require_columns
from udp_ray.data.remote import (
    cache_folder,
    discard,
    put_store,
    refuse_occupied,
)
from udp_ray.data.store import Manifest, PrivateCounts, publish
from udp_ray.data.tokenize import Placement, TextEncoder
from udp_ray.errors import (
    ConfigError,
    DataError,
    GuaranteeError,
    StorageError,
    UdpRayError,
)
from udp_ray.io import is_url, obstacle, vanishes_with_job, writing
from udp_ray.ledger.database import parse_url, public_url
from udp_ray.models.load import load_tokenizer, model_config, tokenizer_fingerprint
from udp_ray.models.positions import require_positions
from udp_ray.on_ray.cluster import connected
from udp_ray.runs.registration import Registration, registered, require_ledger

_MOST_PIECES = 4096
_LEAST_PIECE_BYTES = 1 << 20
_SHUFFLE_BATCH_BYTES = 128 << 20
_PACKAGES = ("udp-ray", "ray", "pyarrow", "tokenizers", "transformers", "numpy")


@dataclass(frozen=True)
class Input:
    """What will be read."""

    pieces: list[Piece]
    heldout_pieces: list[Piece]
    columns: Columns

    @property
    def num_bytes(self) -> int:
        """Size of the input, of parquet before compression. Public, as sizes of files are."""
        return sum(piece.num_bytes for piece in [*self.pieces, *self.heldout_pieces])


@dataclass(frozen=True)
class Prepared:
    """A store that was made."""

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
    )
    heldout = data.heldout if isinstance(data.heldout, list) else []
    return Input(
        _find_pieces("data.input", data.input, data.input_split, columns),
        _find_pieces("data.heldout", heldout, data.input_split, columns),
        columns,
    )


def _find_pieces(field: str, inputs: list[str], split: str, columns: Columns) -> list[Piece]:
    try:
        pieces = find_pieces(inputs, split, _LEAST_PIECE_BYTES)
        # A look at the first file; the others are looked at by who reads them.
        names = column_names(pieces[0]) if pieces else []
        if names:
            require_columns(names, columns.names, pieces[0].location)
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
    encoder = load_encoder(tokenizer, data.block_tokens)
    if model is not None:
        _require_positions(model, data.block_tokens)
    return encoder, find_input(data)


def _require_positions(model: str, block_tokens: int) -> None:
    try:
        config = model_config(model)
    except ConfigError:
        return  # the tokenizer may be at hand where the model is not
    require_positions(model, config, block_tokens)


def prepare(
    data: DataConfig, *, tokenizer: str, model: str | None = None, address: str | None = None
) -> Prepared:
    """Makes the store of `data`; it appears whole, or not at all.

    Args:
        data: The settings.
        tokenizer: Name or folder of the tokenizer.
        model: Name or folder of the model that will be trained, if it is known; its positions bound
            the length of examples.
        address: Ray cluster to join.

    Raises:
        UdpRayError: If the settings or the input cannot be used; nothing is left behind.
    """
    parse_url(data.ledger_url)
    refuse_existing(data.store)
    encoder, found = require_usable(data, tokenizer=tokenizer, model=model)
    with (
        progress("checking the input") as display,
        connected(address),
        registered(data.name, data.ledger_url) as registration,
        _folder_aside(data) as aside,
    ):
        task = Task(
            pieces=(*found.pieces, *found.heldout_pieces),
            num_train_pieces=len(found.pieces),
            columns=found.columns,
            encoder=encoder,
            placement=Placement(
                registration.user_hash_key,
                data.num_shards,
                data.heldout if isinstance(data.heldout, float) else 0.0,
            ),
            max_examples_per_user=data.max_examples_per_user,
            folder=aside,
            url=data.store if is_url(data.store) else None,
        )
        display.phase("reading and tokenizing")
        results = run_stages(task)
        display.phase("describing the store")
        delivered = collect(task, results)
        manifest, counts = finish(
            replace(task, url=None), results, _origin(data, found, registration)
        )
        registration.confirm(manifest.digest())
        if task.url is None:
            publish(aside, Path(data.store))
        else:
            put_store(aside, task.url, delivered=delivered)
    return Prepared(data.store, manifest, counts, registration.aside is not None)


def dry_run_text(data: DataConfig, *, tokenizer: str, model: str | None = None) -> str:
    """Returns what `prepare` would do. Touches nothing, and starts no cluster.

    Raises:
        UdpRayError: What `prepare` would raise before it starts to read.
    """
    parse_url(data.ledger_url)
    refuse_existing(data.store)
    encoder, found = require_usable(data, tokenizer=tokenizer, model=model)
    lines = describe_input([*found.pieces, *found.heldout_pieces], found.columns)
    lines.append(
        f"tokenizer: {tokenizer}, {encoder.info.vocab_size:,} tokens; examples of at most"
        f" {data.block_tokens} tokens"
    )
    if isinstance(data.heldout, float):
        lines.append(f"held out: {data.heldout:g} of the users, by a hash of the user")
    elif data.heldout:
        lines.append(f"held out: {', '.join(data.heldout)}")
    lines.append(f"would make: {data.store} ({data.num_shards} shards)")
    lines.append(f"ledger: {public_url(data.ledger_url)}")
    lines += estimate(found.num_bytes, data.num_shards, encoder.token_type.itemsize)
    return "\n".join(lines)


def prepared_text(prepared: Prepared) -> str:
    """Returns what may be said of a store that was made; says so if it has a new ledger."""
    text = describe_store(prepared.place, prepared.manifest)
    if prepared.is_new_ledger:
        text += (
            "\nthis ledger is NEW and knows of no earlier spending: if models were trained on these"
            " people's text before, prepare again with data.ledger naming the ledger of those runs"
        )
    return text


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


def load_encoder(tokenizer: str, block_tokens: int) -> TextEncoder:
    """Returns the encoder of a tokenizer by its name."""
    loaded = load_tokenizer(tokenizer)
    fingerprint = tokenizer_fingerprint(loaded)
    return TextEncoder.of(
        loaded, name=tokenizer, fingerprint=fingerprint, block_tokens=block_tokens
    )


def run_stages(task: Task) -> dict[int, str]:
    """Runs the pipeline; returns the result of each shard that has users, and of TALLY.

    Raises:
        UdpRayError: What a worker refused, freed of Ray's wrapping.
    """
    num_keys = task.placement.num_shards * (2 if task.has_heldout else 1) + 1
    num_pieces = len(task.pieces)
    results: dict[int, str] = {}
    with _quiet_ray_data():
        # Not fn_kwargs: Ray may export those, field by field, and the task holds the hash key.
        rows = (
            ray.data.range(num_pieces, override_num_blocks=min(num_pieces, _MOST_PIECES))
            .map_batches(partial(read_examples, task=task), batch_size=None, batch_format="pyarrow")
            .repartition(num_keys, keys=["shard"], sort=True)
            .map_batches(
                partial(write_shards, task=task),
                batch_size=None,  # a whole block, which holds whole shards
                batch_format="pyarrow",
            )
        )
        try:
            for row in rows.iter_rows():
                if row["shard"] == REFUSED:
                    raise StorageError(row["result"])
                if row["shard"] in results:
                    raise GuaranteeError(f"shard {row['shard']} was split over two tasks")
                results[row["shard"]] = row["result"]
                current().phase("writing shards", total=num_keys, unit="shard")
                current().advance(len(results))
        except Exception as error:
            own = _own_error(error)
            if own is None:
                raise
            raise own from None
    return results


def _own_error(error: BaseException | None) -> UdpRayError | None:
    """Returns our error from inside those that Ray has wrapped around it."""
    # Ray also makes classes that inherit from ours and its own: the plain one is further inside.
    while error is not None and (
        not isinstance(error, UdpRayError) or isinstance(error, RayTaskError)
    ):
        error = getattr(error, "cause", None) or error.__cause__
    # Ours are one line; what follows is Ray's advice on retrying.
    return None if error is None else type(error)(str(error).splitlines()[0])


def _origin(data: DataConfig, found: Input, registration: Registration) -> Origin:
    source = {"input": ", ".join(data.input), "user_column": found.columns.user}
    source["text_column"] = found.columns.text
    if found.columns.prompt:
        source["prompt_column"] = found.columns.prompt
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
def _folder_aside(data: DataConfig) -> Iterator[Path]:
    """Gives a folder for the owner only, beside the store's or, if that is a URL, on this node.

    It is gone afterwards unless renamed, and so is what an unfinished store has left at its URL.
    """
    path = cache_folder(data.cache) / data.name if is_url(data.store) else Path(data.store)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with writing("the store", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
    try:
        yield aside
    except BaseException:
        if is_url(data.store):
            discard(data.store)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Sets Ray Data up for one run: shuffle over disk, no bars of its own and no log lines."""
    context = DataContext.get_current()
    wanted = {
        "shuffle_strategy": ShuffleStrategy.SHUFFLE_V2,
        "use_disk_based_hash_shuffle": True,
        "shuffle_input_batch_bytes": _SHUFFLE_BATCH_BYTES,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }
    before = {name: getattr(context, name) for name in wanted}
    logger = logging.getLogger("ray.data")
    level = logger.level
    for name, value in wanted.items():
        setattr(context, name, value)
    logger.setLevel(logging.CRITICAL)  # what a worker refuses is raised, and said once
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
