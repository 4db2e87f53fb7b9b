"""The demo: prepares data, trains with privacy and without, compares the models and their texts.

    comparison = demo(config)
    print(comparison.to_text())

The folder of the demo holds everything that it makes, including its own ledger, and each demo
replaces it. Elsewhere a ledger must never be deleted, so a folder that no demo made is refused.
"""

from __future__ import annotations

import json
import math
import shutil
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.generate import GenerateConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.console import progress
from udp_ray.dp.plan import OF_ADAPTIVE
from udp_ray.errors import ConfigError, DataError, UdpRayError
from udp_ray.io import AVERAGE, METRICS_FILE, write_atomic
from udp_ray.on_ray.cluster import connected
from udp_ray.on_ray.generate import one_line, sample_here
from udp_ray.on_ray.prepare import prepare, require_usable
from udp_ray.on_ray.train import train
from udp_ray.runs.result import part_measured

MARK = "made-by-the-demo"
COMPARISON_FILE = "comparison.json"
WITHOUT_PRIVACY = "without-privacy"
RATE_WITHOUT_BANDS = 0.5
"""Learning rate of the comparison over one for correlated noise, as in docs/quality.md."""
NUM_SAMPLES = 3
SAMPLE_TOKENS = 32
LINE = 70
"""Characters of a generated text that are shown."""


@dataclass(frozen=True)
class Row:
    """One model of the comparison, measured on the same held-out users."""

    model: str
    token_perplexity: float
    """exp of the mean loss over the held-out tokens that were measured."""
    user_perplexity: float
    """exp of the mean over the users that were measured of their mean loss."""
    epsilon: float
    """Spent on the training users; infinite without noise."""
    seconds: float
    """Wall-clock time of the run, from its start to its published output."""


@dataclass(frozen=True)
class Comparison:
    """The models that the demo compares."""

    rows: tuple[Row, ...]
    delta: float
    seconds: float
    """Wall-clock time of the whole demo."""
    part_measured: str = ""
    """Which part of the held-out users was measured; "" if it was all."""
    samples: tuple[tuple[str, str], ...] = ()
    """Texts of the base model and of the fine-tuned one, from nothing, with the same random
    numbers; each on one line."""

    def to_text(self) -> str:
        """Returns the table."""
        titles = f"{'perplexity':>12}  {'perplexity':>12}  {'epsilon':>9}  {'seconds':>8}"
        units = f"{'per token':>12}  {'per user':>12}  {'per user':>9}  {'':>8}"
        rule = "-" * (30 + len(titles))
        lines = [
            "Held-out users (lower perplexity is better)",
            "",
            f"  {'':26}  {titles}",
            f"  {'model':26}  {units}".rstrip(),
            f"  {rule[:-2]}",
        ]
        lines += [
            f"  {row.model:26}  {row.token_perplexity:12.2f}  {row.user_perplexity:12.2f}"
            f"  {_short(row.epsilon):>9}  {row.seconds:8.0f}"
            for row in self.rows
        ]
        part = f"; {self.part_measured}" if self.part_measured else ""
        lines += ["", f"  epsilon at delta = {self.delta:g}; {self.seconds:.0f} s in all{part}"]
        if self.samples:
            lines += ["", "Text that the models write, with the same random numbers", ""]
        for place, row in enumerate(self.rows[:2]):
            for number, texts in enumerate(self.samples):
                name = row.model if number == 0 else ""
                lines.append(f"  {name:26}  {_shortened(texts[place])}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Returns the table as JSON, without durations; an infinite epsilon is null.

        The duration of a private run depends on its cohorts: the operator sees it, and no file
        holds it.
        """
        values = asdict(self)
        del values["seconds"]
        for row in values["rows"]:
            del row["seconds"]
            row["epsilon"] = row["epsilon"] if math.isfinite(row["epsilon"]) else None
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def demo(config: ExperimentConfig, *, announce: Callable[[str], None] = print) -> Comparison:
    """Prepares the data, trains with and without privacy, and returns the comparison.

    Args:
        config: The private run; its store and output lie in the folder of the demo.
        announce: Shows a text.

    Raises:
        ConfigError: The folder was not made by a demo, so it must not be emptied.
        UdpRayError: What a user can fix, in a sentence or two.
    """
    start = time.monotonic()
    folder = demo_folder(config)
    require_own_folder(folder)
    open_config = without_privacy(config)
    with progress("checking the input") as display:
        announce = display.announcing(announce)
        require_usable(config.data, tokenizer=config.tokenizer, model=config.model.name)
        replace_folder(folder)
        announce("1/3  Prepare the data: text to a store, sharded by user")
        with connected(config.cluster.address):
            prepare(config.data, tokenizer=config.tokenizer, model=config.model.name)
            announce("\n2/3  Fine-tune with user-level privacy")
            private_s = _timed(lambda: train(config, announce=announce))
            announce("\n3/3  The same without noise and clipping, for comparison: no promise")
            open_s = _timed(lambda: train(open_config, announce=_ignore))
        display.phase("generating text")
        samples = _samples(Path(config.output), announce)
    comparison = Comparison(
        samples=samples,
        rows=compare(
            Path(config.output),
            Path(open_config.output),
            private_s=private_s,
            open_s=open_s,
            publish=config.train.publish,
        ),
        delta=config.privacy.delta,
        seconds=time.monotonic() - start,
        part_measured=part_measured(_first_and_last(Path(config.output))[1]),
    )
    write_atomic(folder / COMPARISON_FILE, comparison.to_json())
    return comparison


def _samples(output: Path, announce: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
    """Returns a few texts of both models; none, with the reason, if they cannot be generated."""
    try:
        return sample_both(output)
    except UdpRayError as error:
        announce(f"No text is shown: {error}")
        return ()


def demo_folder(config: ExperimentConfig) -> Path:
    """Returns the folder of everything that the demo makes: the parent of the private output.

    Raises:
        ConfigError: If the store or the ledger would be elsewhere.
    """
    folder = Path(config.output).parent
    if folder not in Path(config.data.store).parents:
        raise ConfigError(
            f"data.store is {config.data.store}, outside the folder of the demo {folder}: put it"
            " there, since each demo replaces that folder"
        )
    if config.data.ledger is not None:
        raise ConfigError(
            "data.ledger is set, but the demo has its own ledger: leave it out, or use"
            " jobs/prepare.py and jobs/train.py"
        )
    return folder


def require_own_folder(folder: Path) -> None:
    """Refuses a folder that the demo must not empty.

    Raises:
        ConfigError: If it contains something that no demo made.
    """
    is_ours = not folder.exists() or (folder / MARK).is_file()
    if not is_ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} was not made by the demo, which would delete what is in it: give another"
            " output"
        )


def replace_folder(folder: Path) -> None:
    """Makes the folder, or empties that of an earlier demo.

    Raises:
        ConfigError: If it contains something that no demo made.
    """
    require_own_folder(folder)
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def without_privacy(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the same run without noise and clipping.

    Everything else is equal, except that a rate for correlated noise is lowered: it suits the
    larger noise of a step, and without noise and clipping training at that rate is unstable.
    """
    privacy = config.privacy.model_dump() | {
        "epsilon": None,
        "noise_multiplier": 0.0,
        "clip_norm": math.inf,
        "clipping": "flat",
        **{name: PrivacyConfig.model_fields[name].default for name in OF_ADAPTIVE},
        "accept_no_guarantee": True,
        "mechanism": "independent",
        "bands": 1,
    }
    rate = config.train.learning_rate
    if config.privacy.mechanism == "banded":
        rate *= RATE_WITHOUT_BANDS
    return config.model_copy(
        update={
            "privacy": PrivacyConfig(**privacy),
            "train": config.train.model_copy(update={"learning_rate": rate}),
            "output": str(Path(config.output).with_name(WITHOUT_PRIVACY)),
        }
    )


def compare(
    private: Path,
    unprotected: Path,
    *,
    private_s: float,
    open_s: float,
    publish: Literal["last", "average"] = "last",
) -> tuple[Row, ...]:
    """Returns the rows of the table from the output folders of two runs.

    Args:
        private: Of the run with privacy.
        unprotected: Of the run without.
        private_s: How long the first took, in seconds.
        open_s: How long the second took.
        publish: Which weights both runs have published; their losses are shown.

    Raises:
        DataError: If a folder has no evaluation from before or after training.
    """
    before, after = _first_and_last(private)
    _, open_after = _first_and_last(unprotected)
    prefix = AVERAGE if publish == "average" else ""
    return (
        _row("base model", before, 0.0),
        _row("fine-tuned with privacy", after, private_s, prefix),
        _row("without noise and clipping", open_after, open_s, prefix),
    )


def sample_both(
    private: Path, *, max_new_tokens: int = SAMPLE_TOKENS
) -> tuple[tuple[str, str], ...]:
    """Returns texts of the base model and of the fine-tuned one, in the order of the table's rows.

    Generated in this process: both models are small, and no worker has to start.
    """
    config = GenerateConfig(
        run=str(private), num_samples=NUM_SAMPLES, max_new_tokens=max_new_tokens
    )
    samples = sample_here(config, prompts=[])
    return tuple((one_line(each.base_text or ""), one_line(each.text)) for each in samples)


def _shortened(text: str) -> str:
    return textwrap.shorten(text, LINE, placeholder=" ...")


def _first_and_last(output: Path) -> tuple[dict[str, float], dict[str, float]]:
    rows = json.loads((output / METRICS_FILE).read_text())
    if len(rows) < 2 or rows[0]["step"] != 0:
        raise DataError(f"{output / METRICS_FILE} lacks an evaluation before or after training")
    return rows[0], rows[-1]


def _row(model: str, metrics: dict[str, float], seconds: float, prefix: str = "") -> Row:
    return Row(
        model=model,
        token_perplexity=float(metrics[f"{prefix}token_perplexity"]),
        user_perplexity=float(metrics[f"{prefix}user_perplexity"]),
        epsilon=float(metrics["epsilon"]),  # "inf" stands as text in JSON
        seconds=seconds,
    )


def _timed(run: Callable[[], object]) -> float:
    start = time.monotonic()
    run()
    return time.monotonic() - start


def _ignore(text: str) -> None:
    """Shows nothing of the comparison run, whose statement would only confuse."""


def _short(epsilon: float) -> str:
    return f"{epsilon:.2f}" if math.isfinite(epsilon) else "infinite"
