"""Generates text from a released model, beside its base model, here or on the cluster's workers.

    result = generate(GenerateConfig(run="runs/first", prompt="how do I"))
    print(result.to_text())

1. Everything that can be wrong is checked before a model is loaded: folders, prompts, lengths.
2. Texts are divided into batches by the length of their context, on the driver, so that neither the
   number of workers nor their order changes what is in a batch.
3. Batches are executed in this process or, on a cluster, by Ray Data with an actor per worker that
   holds the models. The function is pure, so a batch whose worker died is executed again.
4. With an output folder, held-out text is scored as well, and the statement of the run is copied
   beside the texts before they are written.

Ray is imported only where it is used: a few texts need none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from udp_ray.config.generate import GenerateConfig
from udp_ray.console import current, progress
from udp_ray.data.remote import is_at_hand
from udp_ray.data.store import TokenStore
from udp_ray.data.texts import heldout_texts, read_texts
from udp_ray.data.tokenize import TextEncoder
from udp_ray.errors import ConfigError, UdpRayError
from udp_ray.io import CONFIG_FILE, RUN_FILE, OutputFolder, is_url, write_atomic, writing
from udp_ray.models.generate import (
    ADAPTERS_FILE,
    Batch,
    Continuation,
    Generated,
    ModelSource,
    Sampler,
    Sampling,
)
from udp_ray.models.hub import load_tokenizer, model_config, tokenizer_fingerprint
from udp_ray.models.positions import num_positions
from udp_ray.reports.generated import (
    BASE,
    COMPARISON_FIGURE,
    COMPARISON_FILE,
    COMPARISON_PAGE,
    FEWEST_TEXTS,
    GENERATION_FILE,
    HELDOUT,
    HELDOUT_NOT_COVERED,
    TRAINED,
    Comparison,
    Coverage,
    generation_to_json,
)
from udp_ray.reports.tables import wrap

_SHOWN = 3
"""Texts that are printed if all are written to the output folder."""
_MOST_BLOCKS = 4096
_WEIGHTS = ("*.safetensors", "*.bin")
_READ_AT_ONCE = 1 << 24
_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("num_tokens", pa.int64()),
        ("has_ended", pa.bool_()),
        ("base_text", pa.string()),
        ("base_num_tokens", pa.int64()),
        ("base_has_ended", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """A generated text, and the base model's with the same prompt and random numbers."""

    number: int
    """From 0; selects the random numbers."""
    prompt: str | None
    """None if the text began from nothing."""
    text: str
    num_tokens: int
    """Without the end-of-text token."""
    has_ended: bool
    """Whether the text ended by itself."""
    base_text: str | None = None
    base_num_tokens: int | None = None
    base_has_ended: bool | None = None

    def to_text(self) -> str:
        """Returns the sample for a terminal."""
        parts = [("prompt", self.prompt), ("base", self.base_text), (TRAINED, self.text)]
        lines = [f"{self.number}"]
        for name, text in parts:
            if text is not None:
                lines.append(wrap(f"  {name:10}  {one_line(text)}", indent=" " * 14))
        return "\n".join(lines)


def one_line(text: str) -> str:
    """Returns a generated text on one line; says so if there is none."""
    return " ".join(text.split()) or "(ends at once)"


@dataclass(frozen=True)
class GenerationResult:
    """Generated texts, and what is promised to the users whose text the model was trained on."""

    run: str
    """Folder or name of the model."""
    samples: tuple[Sample, ...]
    """In the order of their numbers."""
    coverage: Coverage
    """The statement of the model."""
    comparison: Comparison | None = None
    """With held-out text; None without an output folder."""
    output: Path | None = None
    """Folder of the texts; None if they were not written."""

    def to_text(self) -> str:
        """Returns the texts (a few of them, if they were written), the comparison, the promise."""
        shown = self.samples if self.output is None else self.samples[:_SHOWN]
        lines = [sample.to_text() for sample in shown]
        if self.comparison is not None:
            lines += ["", self.comparison.to_text()]
        lines += ["", *map(wrap, self.coverage.notes())]
        if self.output is not None:
            lines += ["", f"{len(self.samples):,} texts, statement and comparison: {self.output}"]
        return "\n".join(lines)


# ---- what can be checked before a model is loaded


@dataclass(frozen=True)
class _Job:
    """What was checked: all that is needed to sample."""

    config: GenerateConfig
    source: ModelSource
    sampling: Sampling
    coverage: Coverage
    prompts: list[str | None]
    """Of each text."""
    contexts: list[list[int]]
    """Tokens before each text."""
    start: list[int]
    """Tokens before a text that begins from nothing."""
    prefix: tuple[int, ...]
    """Tokens that the tokenizer puts before each text."""
    heldout: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """About the comparison."""

    @property
    def base(self) -> str | None:
        """The base model, if its texts are compared."""
        return self.source.base if self.sampling.compare_base else None


def _check(config: GenerateConfig, prompts: Sequence[str] | None) -> _Job:
    if config.output is not None:
        OutputFolder(Path(config.output)).check(resume=False)
    _require_model(config.run)
    settings = _settings_of(config.run)
    base = _base_of(config, settings)
    has_adapters = _has_adapters(config.run)
    configuration = (
        model_config(base, field="base")
        if has_adapters and base
        else model_config(config.run, field="run")
    )
    positions = num_positions(configuration)
    if base is not None:
        _require_same_vocabulary(config.run, configuration, base)
        of_base = num_positions(model_config(base, field="base"))
        positions = min((each for each in (positions, of_base) if each), default=None)
    tokenizer = load_tokenizer(config.run, field="run")
    encoder = TextEncoder.of(tokenizer, name=config.run, fingerprint="0" * 64, block_tokens=2**24)
    start = list(encoder.prefix) or [encoder.info.eos_id]
    texts = _prompts(config, prompts)
    contexts = [
        start if text is None else ([*encoder.prefix, *tokens] or start)
        for text, tokens in zip(texts, encoder.encode([t or "" for t in texts]), strict=True)
    ]
    _require_room(config, contexts, positions)
    source = ModelSource(config.run, base, _device(config), config.autocast)
    job = _Job(
        config=config,
        source=source,
        sampling=Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            compare_base=config.compare_base,
            is_scored=config.output is not None,
        ),
        coverage=Coverage.of(config.run, has_prompts=texts[0] is not None),
        prompts=[text for text in texts for _ in range(config.num_samples)],
        contexts=[context for context in contexts for _ in range(config.num_samples)],
        start=start,
        prefix=encoder.prefix,
    )
    if config.output is not None:
        fingerprint = tokenizer_fingerprint(tokenizer)
        _find_heldout(job, encoder, settings.get("data", {}), fingerprint)
    return job


def _require_model(run: str) -> None:
    """Refuses a folder without a model; a name is looked up later."""
    folder = Path(run)
    if not folder.is_dir() or (folder / "config.json").is_file() or _has_adapters(run):
        return
    if (folder / "trials").is_dir():
        remedy = f"give that of a trial, as {folder / 'trials' / '0001'}"
    elif (folder / RUN_FILE).is_file():
        remedy = "its run has not ended or diverged; continue it with --resume of jobs/train.py"
    else:
        remedy = "give the output folder of a finished run"
    raise ConfigError(
        f"run is {run}, a folder without a model (no config.json, no {ADAPTERS_FILE}): {remedy}"
    )


def _has_adapters(run: str) -> bool:
    return ModelSource(run).has_adapters


def _settings_of(run: str) -> Mapping[str, Any]:
    """Returns the settings that a run left in its folder; empty for a model without a run."""
    file = Path(run) / CONFIG_FILE
    try:
        settings = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict) or not _are_of_a_run(settings):
        raise ConfigError(
            f"{file} cannot be read as the settings of a run: restore it from a copy, or remove it"
            " and give base"
        )
    return settings


def _are_of_a_run(settings: Mapping[str, Any]) -> bool:
    """Returns whether settings have the form of a run's, as far as they are read here."""
    model, data = settings.get("model", {}), settings.get("data", {})
    if not isinstance(model, dict) or not isinstance(data, dict):
        return False
    return all(isinstance(each, str | None) for each in (model.get("name"), data.get("store")))


def _base_of_adapters(run: str) -> Any:
    """Returns the model that adapters without a run's settings say they belong to."""
    file = Path(run) / ADAPTERS_FILE
    try:
        return json.loads(file.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{file} cannot be read, or does not name a base model: restore it from a copy"
        ) from None


def _base_of(config: GenerateConfig, settings: Mapping[str, Any]) -> str | None:
    """Returns the base model that is needed: for adapters, or to compare with; None if none is."""
    named = settings.get("model", {}).get("name")
    has_adapters = _has_adapters(config.run)
    if named is None and has_adapters:
        named = _base_of_adapters(config.run)
    is_missing = named and Path(named).is_absolute() and not Path(named).is_dir()
    if config.base is None and is_missing and (has_adapters or config.compare_base):
        other = "" if has_adapters else ", or set compare_base false"
        raise ConfigError(
            f"base is missing, and the run's own, {named}, is not on this machine: give base the"
            f" place where it is{other}"
        )
    base = config.base or named
    return str(base) if base and (has_adapters or config.compare_base) else None


def _require_same_vocabulary(run: str, configuration: Any, base: str) -> None:
    other = model_config(base, field="base")
    sizes = [each.get_text_config().vocab_size for each in (configuration, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"base is {base}, with a vocabulary of {sizes[1]:,} tokens, and run is {run},"
            f" with one of {sizes[0]:,}: give"
            " the model that the run was trained from, or set compare_base false"
        )


def _prompts(config: GenerateConfig, prompts: Sequence[str] | None) -> list[str | None]:
    """Returns the prompts; a single None to begin from nothing."""
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text, and not a list of texts: give [prompt]")
    if prompts is not None:
        return [*prompts] or [None]
    if config.prompts is not None:
        return [*read_texts(config.prompts, config.prompt_column, field="prompts")]
    return [config.prompt]


def _require_room(
    config: GenerateConfig, contexts: Sequence[Sequence[int]], positions: int | None
) -> None:
    number, longest = max(enumerate(map(len, contexts), start=1), key=lambda pair: pair[1])
    if positions is None or longest + config.max_new_tokens <= positions:
        return
    name = f"prompt {number}" if len(contexts) > 1 else "the prompt or start of a text"
    what = f"{name} has {longest} token{'s' * (longest > 1)}"
    raise ConfigError(
        f"max_new_tokens is {config.max_new_tokens} and {what}, together more than the {positions}"
        f" positions of {config.run} or its base: lower max_new_tokens, or shorten the prompt"
    )


def _device(config: GenerateConfig) -> str:
    if not config.cluster.use_gpu:
        return "cpu"
    if not _uses_ray(config) and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu is true, but this machine has no CUDA device: set it to false, or give"
            " cluster.address"
        )
    return "cuda"


def _uses_ray(config: GenerateConfig) -> bool:
    """Returns whether workers of a cluster are asked for, or this is a job on one."""
    cluster = config.cluster
    return bool(cluster.most_workers > 1 or cluster.address or os.environ.get("RAY_ADDRESS"))


def _find_heldout(
    job: _Job, encoder: TextEncoder, data: Mapping[str, Any], fingerprint: str
) -> None:
    """Reads held-out texts into a job; else notes why there are none.

    They are as many as will be generated, and at least `FEWEST_TEXTS`, each cut to
    `max_new_tokens`, as generated ones are.
    """
    config, wanted = job.config, max(len(job.prompts), FEWEST_TEXTS)
    if config.heldout is not None:
        texts = read_texts(config.heldout, config.heldout_column, field="heldout")
        drawn = np.random.default_rng(config.seed).permutation(len(texts))[:wanted]
        ids = encoder.encode([texts[number] for number in drawn])
        found = [[*tokens, encoder.info.eos_id] for tokens in ids if tokens]
        reason = f"{config.heldout} has only a few texts"
    else:
        found, reason = _of_store(job, data.get("store"), fingerprint, wanted)
    if len(found) < FEWEST_TEXTS:
        job.notes.append(
            f"Not compared with held-out text: {reason}; give at least {FEWEST_TEXTS} texts by"
            " heldout."
        )
        return
    job.heldout.extend(text[: config.max_new_tokens] for text in found)
    job.notes.append(HELDOUT_NOT_COVERED)


def _of_store(
    job: _Job, place: str | None, fingerprint: str, wanted: int
) -> tuple[list[list[int]], str]:
    """Returns held-out texts of the run's store, and why there are none or only a few."""
    if place is None:
        return [], "the model's folder names no store"
    if is_url(place) or not is_at_hand(place):
        return [], f"the run's store {place} is not in reach as a folder"
    try:
        store = TokenStore.open(place, verify=False)
    except UdpRayError as error:
        return [], str(error)
    if store.heldout is None:
        return [], f"the store {place} has no held-out part"
    if store.manifest.tokenizer.fingerprint != fingerprint:
        return [], f"the store {place} was made with another tokenizer"
    found = heldout_texts(store.heldout, num_texts=wanted, prefix=job.prefix, seed=job.config.seed)
    return found, f"the store {place} has only a few held-out texts"


def dry_run_text(config: GenerateConfig) -> str:
    """Returns what `generate` would do. Loads no model, and writes nothing.

    Raises:
        UdpRayError: What `generate` would raise before it loads a model.
    """
    job = _check(config, None)
    kind = "adapters" if job.source.has_adapters else "model"
    where = "workers of a cluster" if _uses_ray(config) else "this process"
    prompts = "from nothing" if job.prompts[0] is None else (
        f"after {len(job.prompts) // config.num_samples:,} prompts"
    )  # fmt: skip
    lines = [
        f"{kind}: {config.run}",
        f"base model: {job.base or 'not compared with'}",
        f"would generate {len(job.prompts):,} texts {prompts}, of at most {config.max_new_tokens}"
        f" tokens, temperature {config.temperature:g}, top_p {config.top_p:g}, seed {config.seed},"
        f" in {len(_batches(job)):,} batches, by {where}",
        f"would write: {config.output or 'nothing, but to the terminal'}",
        *job.notes,
        *job.coverage.notes(),
    ]
    return "\n".join(map(wrap, lines))


# ---- generating


def generate(
    config: GenerateConfig,
    *,
    prompts: Sequence[str] | None = None,
    announce: Callable[[str], None] = print,
) -> GenerationResult:
    """Generates text from a model, and from its base model, and writes it if an output is given.

    Args:
        config: The settings.
        prompts: Prompts instead of those that the settings name.
        announce: Shows a text.

    Raises:
        UdpRayError: If a setting, a folder or a file is at fault; nothing is written then.
    """
    with progress("checking the model and the prompts") as display:
        job = _check(config, prompts)
        found = _execute(job, _batches(job), display.announcing(announce))
        decoder = Sampler(job.source, job.sampling)
        texts = sorted((g for batch in found for g in batch[1]), key=lambda each: each.number)
        generated, scored = texts[: len(job.prompts)], texts[len(job.prompts) :]
        samples = tuple(_sample(job, decoder, each) for each in generated)
        if config.output is None:
            return GenerationResult(config.run, samples, job.coverage)
        display.phase("comparing and writing")
        comparison = _compare(job, generated, scored)
        _write(job, samples, comparison, Path(config.output))
    return GenerationResult(config.run, samples, job.coverage, comparison, Path(config.output))


def sample_here(config: GenerateConfig, prompts: Sequence[str]) -> list[Sample]:
    """Returns one text for each prompt, generated in this process.

    Raises:
        UdpRayError: If the model or a setting is at fault.
    """
    job = _check(config, prompts)
    sampler = Sampler(job.source, job.sampling)
    texts = [each for batch in _batches(job) for each in sampler.run(batch)]
    return [_sample(job, sampler, each) for each in sorted(texts, key=lambda each: each.number)]


def _batches(job: _Job) -> list[Batch]:
    """Returns the texts to generate by the length of their context, then those to score.

    Held-out texts are numbered after those that are generated.
    """
    size = job.config.batch_size
    alike: dict[int, list[int]] = {}
    for number, context in enumerate(job.contexts):
        alike.setdefault(len(context), []).append(number)
    runs = [
        numbers[start : start + size]
        for _, numbers in sorted(alike.items())
        for start in range(0, len(numbers), size)
    ]
    generated = [Batch(run, [job.contexts[number] for number in run]) for run in runs]
    first = len(job.contexts)
    longest_first = sorted(range(len(job.heldout)), key=lambda n: (-len(job.heldout[n]), n))
    given = [longest_first[start : start + size] for start in range(0, len(longest_first), size)]
    scored = [
        Batch(
            [first + number for number in run],
            [job.start] * len(run),
            [job.heldout[number] for number in run],
        )
        for run in given
    ]
    return generated + scored


def _execute(
    job: _Job, batches: Sequence[Batch], announce: Callable[[str], None]
) -> list[tuple[int, list[Generated]]]:
    """Returns what became of each batch, here or on workers, with progress."""
    total = sum(len(batch.numbers) for batch in batches)
    if _uses_ray(job.config):
        found = _on_workers(job, batches, announce)
    else:
        current().phase("loading the model")
        sampler = Sampler(job.source, job.sampling)
        found = ((number, sampler.run(batch)) for number, batch in enumerate(batches))
    done, results = 0, []
    for result in found:
        results.append(result)
        done += len(result[1])
        current().phase("generating", total=total, unit="text")
        current().advance(done)
    return results


class SamplerActor:
    """Executes batches on a worker; loads the models with the first one."""

    def __init__(self, source: ModelSource, sampling: Sampling) -> None:
        self._sampler = Sampler(source, sampling)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Returns the texts of each batch as JSON, or a user's error, which Ray would wrap."""
        texts, errors = [], []
        for batch in rows["batch"]:
            try:
                found = self._sampler.run(Batch.from_dict(json.loads(batch)))
            except UdpRayError as error:
                texts.append("")
                errors.append(str(error))
            else:
                texts.append(json.dumps([asdict(each) for each in found]))
                errors.append("")
        return {"number": rows["number"], "texts": texts, "error": errors}


def _on_workers(
    job: _Job, batches: Sequence[Batch], announce: Callable[[str], None]
) -> Iterator[tuple[int, list[Generated]]]:
    """Yields what became of each batch, as workers finish them."""
    import ray

    from udp_ray.on_ray.cluster import connected, require_capacity, worker_resources
    from udp_ray.on_ray.tasks import quiet_ray_data

    cluster = job.config.cluster
    needed = worker_resources(cluster)
    items = [
        {"number": number, "batch": json.dumps(asdict(batch))}
        for number, batch in enumerate(batches)
    ]
    with connected(cluster.address), quiet_ray_data():
        require_capacity(cluster, announce)
        current().phase("starting workers and loading the model")
        # A row is a batch of texts, so that Ray Data cannot divide or join batches.
        rows = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
        found = rows.map_batches(
            SamplerActor,
            fn_constructor_args=(job.source, job.sampling),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(cluster.least_workers, len(items)),
                max_size=min(cluster.most_workers, len(items)),
            ),
            num_cpus=needed["CPU"],
            num_gpus=needed.get("GPU", 0.0),
        )
        for row in found.iter_rows():
            if row["error"]:
                raise ConfigError(row["error"])
            yield int(row["number"]), list(map(Generated.from_dict, json.loads(row["texts"])))


def _sample(job: _Job, decoder: Sampler, found: Generated) -> Sample:
    base = found.base
    return Sample(
        number=found.number,
        prompt=job.prompts[found.number],
        text=decoder.decode(found.trained.tokens),
        num_tokens=len(found.trained.tokens),
        has_ended=found.trained.has_ended,
        base_text=None if base is None else decoder.decode(base.tokens),
        base_num_tokens=None if base is None else len(base.tokens),
        base_has_ended=None if base is None else base.has_ended,
    )


# ---- output


def _compare(job: _Job, generated: Sequence[Generated], scored: Sequence[Generated]) -> Comparison:
    sets: dict[str, list[Continuation]] = {TRAINED: [each.trained for each in generated]}
    base = [each.base for each in generated if each.base is not None]
    if base:
        sets[BASE] = base
    if scored:
        sets[HELDOUT] = [each.trained for each in scored]
    return Comparison.of(
        sets,
        job.config.max_new_tokens,
        reference=TRAINED if job.source.base is None else BASE,
        notes=job.notes,
    )


def _write(job: _Job, samples: Sequence[Sample], comparison: Comparison, folder: Path) -> None:
    """Writes the output folder; the statement first, so that no text is there without it."""
    # Imported only here: matplotlib and TensorBoard take seconds.
    from udp_ray.reports.figures import draw_comparison

    with writing("the texts", folder):
        folder.mkdir(parents=True, exist_ok=True)
    job.coverage.save(folder)
    weights = {file.name: _sha256(file) for kind in _WEIGHTS
               for file in sorted(Path(job.config.run).glob(kind))}  # fmt: skip
    note = generation_to_json(job.config, job.coverage, base=job.base, weights=weights)
    write_atomic(folder / GENERATION_FILE, note)
    rows = [asdict(sample) for sample in samples]
    if job.config.format == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomic(folder / "samples.jsonl", "".join(lines))
    else:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer)
        write_atomic(folder / "samples.parquet", buffer.getvalue())
    title = (
        f"{job.config.run}: {len(samples):,} texts of at most {job.config.max_new_tokens} tokens"
    )
    write_atomic(folder / COMPARISON_FILE, comparison.to_json())
    write_atomic(folder / COMPARISON_PAGE, comparison.to_markdown())
    write_atomic(folder / COMPARISON_FIGURE, draw_comparison(comparison, title=title))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_READ_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()
