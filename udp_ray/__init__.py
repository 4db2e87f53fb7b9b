"""User-level differentially private fine-tuning of language models, distributed on Ray.

The public API. Importing it loads neither torch nor Ray: each name is loaded when it is first used.

    import udp_ray

    config = udp_ray.ExperimentConfig.load("chats.yaml", {"output": "runs/first"})
    plan = udp_ray.PrivacyPlan.from_config(config.privacy, num_users=config.privacy.population)
    udp_ray.prepare(config)                 # text keyed by user -> a token store
    result = udp_ray.train(config)          # on Ray Train and DeepSpeed, under the plan
    print(result.to_text())
    print(udp_ray.verify(config.output).to_text())
    print(udp_ray.generate(udp_ray.GenerateConfig(run=config.output)).to_text())

One's own torch module and tensors, in one process and without Ray: `udp_ray.engine.Trainer`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from udp_ray.config.experiment import ExperimentConfig as ExperimentConfig
    from udp_ray.config.generate import GenerateConfig as GenerateConfig
    from udp_ray.config.privacy import PrivacyConfig as PrivacyConfig
    from udp_ray.config.sweep import SweepJobConfig as SweepJobConfig
    from udp_ray.dp.plan import PrivacyPlan as PrivacyPlan
    from udp_ray.ledger.ledger import Ledger as Ledger
    from udp_ray.on_ray.generate import GenerationResult
    from udp_ray.on_ray.prepare import PrepareResult
    from udp_ray.reports.verify import VerificationResult
    from udp_ray.runs.result import RunResult, SweepResult

__version__ = "0.1.0"

_CLASSES = {
    "ExperimentConfig": "udp_ray.config.experiment",
    "GenerateConfig": "udp_ray.config.generate",
    "Ledger": "udp_ray.ledger.ledger",
    "PrivacyConfig": "udp_ray.config.privacy",
    "PrivacyPlan": "udp_ray.dp.plan",
    "SweepJobConfig": "udp_ray.config.sweep",
}
"""Public classes, by the module that defines each."""

_FUNCTIONS = ("generate", "prepare", "sweep", "train", "verify")

__all__ = [*_CLASSES, *_FUNCTIONS]


def prepare(config: ExperimentConfig) -> PrepareResult:
    """Converts text keyed by user into the token store that training reads, with Ray Data.

    Args:
        config: `config.data` names the input, the columns and the store; `config.model.name` (or
            `config.data.tokenizer`) the tokenizer.

    Returns:
        The store that was written, with its manifest; `to_text()` describes it.

    Raises:
        UdpRayError: If an input, a column, a setting or the disk is at fault, in one sentence. No
            partial store is left.
    """
    from udp_ray.console import progress
    from udp_ray.imports import quick_imports

    with progress("loading libraries"), quick_imports():
        from udp_ray.on_ray.prepare import prepare as prepare_on_ray
    return prepare_on_ray(
        config.data,
        tokenizer=config.tokenizer,
        model=config.model.name,
        address=config.cluster.address,
    )


def train(config: ExperimentConfig, *, resume: bool = False) -> RunResult:
    """Fine-tunes a language model with user-level differential privacy, on Ray.

    The run is admitted by the ledger of `config.data`, which charges its whole (epsilon, delta).
    The driver connects to `config.cluster.address`, or starts Ray on this machine.

    Args:
        config: All settings of the run. `config.data.store` must have been prepared.
        resume: Continue the run in `config.output` from its last committed checkpoint.

    Returns:
        The result: where the model lies, held-out metrics by step, and the privacy statement with
        the epsilon spent; `to_text()` prints all of it.

    Raises:
        PrivacyBudgetExceededError: If the dataset's budget does not allow the run.
        UdpRayError: For any other mistake or fault that the user can correct, in one sentence.

    Privacy:
        What leaves the run, in `config.output`, is (epsilon, delta)-DP for each user, under the
        assumptions that the statement lists.
    """
    from udp_ray.console import progress
    from udp_ray.imports import quick_imports

    with progress("loading libraries"), quick_imports():
        from udp_ray.on_ray.train import train as train_on_ray
    return train_on_ray(config, resume=resume)


def sweep(config: SweepJobConfig, *, resume: bool = False) -> SweepResult:
    """Searches clip norms and group sizes at a fixed compute, under one privacy budget, on Ray.

    Args:
        config: The settings of a run, and in `config.sweep` the values to try and what is released.
        resume: Continue the sweep in `config.output`; nothing is charged again.

    Returns:
        The result: the chosen model, the sweep's statement, and, if all trials are released, a row
        for each; `to_text()` prints it.

    Raises:
        PrivacyBudgetExceededError: If the dataset's budget does not allow the sweep.
        UdpRayError: For any other mistake or fault that the user can correct, in one sentence.

    Privacy:
        The price covers the whole search, and is charged before the first trial begins.
    """
    from udp_ray.console import progress
    from udp_ray.imports import quick_imports

    with progress("loading libraries"), quick_imports():
        from udp_ray.on_ray.tune import sweep as sweep_on_ray
    return sweep_on_ray(config, resume=resume)


def generate(config: GenerateConfig, *, prompts: Sequence[str] | None = None) -> GenerationResult:
    """Generates text from a model that a run has published, and from its base model.

    Args:
        config: Names the model, and says how to sample and where to write.
        prompts: Prompts instead of those that the settings name.

    Returns:
        The texts, the statement that covers them, and, with `config.output`, their comparison with
        held-out text; `to_text()` prints all of it.

    Raises:
        UdpRayError: If the model, a prompt or a setting is at fault, in one sentence.

    Privacy:
        The texts are post-processing of the model, so its guarantee covers them at no further
        charge. It covers neither prompts nor the held-out text that they are compared with.
    """
    from udp_ray.console import progress
    from udp_ray.imports import quick_imports

    with progress("loading libraries"), quick_imports():
        from udp_ray.on_ray.generate import generate as generate_texts
    return generate_texts(config, prompts=prompts)


def verify(output: str | Path, *, ledger_url: str | None = None) -> VerificationResult:
    """Recomputes the epsilon of a finished run or sweep and compares statement and ledger.

    Args:
        output: The output folder, or a copy of its privacy.json.
        ledger_url: SQLAlchemy URL of the ledger. Default: the one that the statement names.

    Returns:
        All comparisons; `agrees` is their conjunction, `to_text()` lists them.

    Raises:
        UdpRayError: If the statement or the ledger cannot be read.
    """
    from udp_ray.reports.verify import verify as verify_output

    return verify_output(Path(output), ledger_url=ledger_url)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    raise AttributeError(f"module 'udp_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
