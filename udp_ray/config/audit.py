"""The settings of an audit: a training run with canary users, made to measure what it reveals.

The section stands beside those of a training run, and `jobs/audit.py` alone reads it. So
`jobs/train.py` can never train on canaries, and a settings file may serve both.

    config = AuditJobConfig.load("settings.yaml", ["audit.canary_users=1000"])
    config.audit.num_guesses
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import LocalFolder, PositiveInt, Section
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.errors import ConfigError
from udp_ray.io import CONFIG_FILE

GUESSED_SHARE = 0.2
"""Share of the canaries that is guessed at by default. Sure guesses tell more than many: of this
share, half are the highest scores and half the lowest."""


class AuditConfig(Section):
    """Canary users: synthetic users of an audited run. Each is in with probability 1/2."""

    box: Literal["white", "black"] = "white"
    """white: canaries are directions of gradients, scored by every update. black: canaries are
    users with synthetic text, scored by the losses of released models."""
    canary_users: PositiveInt = 1000
    """Number of canary users m, at least 1. More of them raise the largest bound possible."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the canaries, from 0. It is no secret and decides no noise; another one gives another
    audit of the same settings."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence of the measured bound, from 0.5 to below 1."""
    guesses: PositiveInt | None = None
    """Canaries that are guessed at, 1 to audit.canary_users, chosen before scores are seen.
    Default: a fifth of them."""
    accept_canaries: bool = False
    """Does not mark the model as not for release, although it was trained on synthetic users."""
    canary_text: Literal["random", "rare", "sampled"] = "random"
    """Texts of a black box audit: random tokens, rare words of the tokenizer, or text sampled from
    the base model at high temperature."""
    texts_per_canary: PositiveInt = 1
    """Texts that each canary of a black box audit has written, at least 1."""
    text_tokens: PositiveInt = 48
    """Tokens of such a text, about, at least 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.guesses is not None and self.guesses > self.canary_users:
            raise ValueError(
                f"audit.guesses is {self.guesses}, above audit.canary_users = {self.canary_users}:"
                " give at most one guess per canary"
            )
        return self

    @property
    def num_guesses(self) -> int:
        """Returns `guesses`, with its default filled in."""
        return self.guesses or max(1, round(GUESSED_SHARE * self.canary_users))


class AuditJobConfig(ExperimentConfig):
    """All the settings of an audited run."""

    audit: AuditConfig = AuditConfig()
    of: LocalFolder | None = None
    """Output folder of a run: its settings are audited, with its noise, and options that are given
    beside it win. Default: the settings of --config."""

    @model_validator(mode="after")
    def _check_canaries(self) -> Self:
        if self.audit.box == "white" and not math.isfinite(self.privacy.clip_norm):
            raise ValueError(
                "privacy.clip_norm is infinite and audit.box white, whose canaries are as large as"
                " the clip norm: give a finite privacy.clip_norm, or audit.box black"
            )
        users, canaries = self.privacy.population, self.audit.canary_users
        is_moved = self.audit.box == "white" and self.privacy.clipping == "adaptive"
        # Each canary counts as clipped, so many of them would raise the clip norm in each step.
        if is_moved and users is not None and canaries > users / 4:
            raise ValueError(
                f"audit.canary_users is {canaries}, above a quarter of privacy.population ="
                f" {users}, and canaries move the clip norm of privacy.clipping adaptive: give"
                " fewer, or another privacy.clipping"
            )
        return self

    def digest(self) -> str:
        """Returns the digest of the run's settings and of who its canaries are."""
        canaries = self.audit.model_dump(
            mode="json",
            exclude={"confidence", "guesses", "accept_canaries"},  # which change no step
        )
        run = without_audit(self).digest()
        text = json.dumps({"run": run, "audit": canaries}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def without_audit(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the settings of the run alone, without those of an audit."""
    return ExperimentConfig.model_construct(
        **{name: getattr(config, name) for name in ExperimentConfig.model_fields}
    )


def audit_of(config: ExperimentConfig) -> AuditConfig | None:
    """Returns the audit section of a run that is made to be audited; None for all other runs."""
    return config.audit if isinstance(config, AuditJobConfig) else None


def white_canaries_of(config: ExperimentConfig) -> AuditConfig | None:
    """Returns the audit section if canaries are directions that the engine adds; else None."""
    audit = audit_of(config)
    return audit if audit is not None and audit.box == "white" else None


def require_option_of(config: AuditJobConfig, argv: Sequence[str] | None = None) -> None:
    """Refuses `of` in a settings file, which would name a run without taking its settings.

    Raises:
        ConfigError: `of` was not given as an option.
    """
    words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    if config.of is not None and "--of" not in words:
        raise ConfigError(
            f"of is {config.of} in the settings file: give it as --of {config.of}, which takes the"
            " settings of that run"
        )


def with_settings_of(argv: Sequence[str] | None = None) -> list[str]:
    """Returns arguments in which --of RUN also names the settings file of that run.

    Args:
        argv: The arguments; default: those of the process.

    Raises:
        ConfigError: --config is given as well, or the run has no settings file.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = [word.partition("=")[0] for word in arguments]
    if "--of" not in names:
        return arguments
    if "--config" in names:
        raise ConfigError(
            "--of and --config are both given, and --of takes the settings of its run: leave"
            " --config out, and give what differs as options"
        )
    place = names.index("--of")
    _, is_joined, value = arguments[place].partition("=")
    if not is_joined:
        value = arguments[place + 1] if place + 1 < len(arguments) else ""
    if not value or value.startswith("--"):
        return arguments  # the parser says what is missing
    file = Path(value) / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"--of {value} holds no {CONFIG_FILE}: give the output folder of a run that has ended"
        )
    return ["--config", str(file), *arguments]
