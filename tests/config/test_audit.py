"""The settings of audited runs: what they change of a run's digest, and who reads them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from udp_ray.config.audit import (
    AuditConfig,
    AuditJobConfig,
    audit_of,
    require_option_of,
    white_canaries_of,
    with_settings_of,
)
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.errors import ConfigError

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


def load(*overrides: str) -> AuditJobConfig:
    return AuditJobConfig.load(DEMO, overrides)


def test_a_fifth_is_guessed_at_unless_told_otherwise() -> None:
    assert AuditConfig(canary_users=1000).num_guesses == 200
    assert AuditConfig(canary_users=1).num_guesses == 1
    assert AuditConfig(canary_users=50, guesses=50).num_guesses == 50


def test_canaries_are_part_of_the_digest_and_statistics_are_not() -> None:
    plain = load("audit.canary_users=100")
    same = load(
        "audit.canary_users=100", "audit.confidence=0.9", "audit.guesses=3",
        "audit.accept_canaries=true",
    )  # fmt: skip
    assert plain.digest() == same.digest()
    others = [
        load("audit.canary_users=101"),
        load("audit.canary_users=100", "audit.seed=1"),
        load("audit.canary_users=100", "audit.box=black"),
        load("audit.canary_users=100", "train.learning_rate=0.5"),
    ]
    digests = {config.digest() for config in [plain, *others]}
    assert len(digests) == 5
    assert ExperimentConfig.load(DEMO).digest() not in digests


def test_only_an_audited_run_has_canaries() -> None:
    assert audit_of(ExperimentConfig.load(DEMO)) is None
    white, black = load(), load("audit.box=black")
    assert white_canaries_of(white) == white.audit
    assert audit_of(black) == black.audit
    assert white_canaries_of(black) is None
    # What a worker gets is still an audit.
    assert white_canaries_of(pickle.loads(pickle.dumps(white))) == white.audit
    assert white_canaries_of(white.model_copy(update={"output": "/elsewhere"})) == white.audit


def test_a_run_ignores_the_audit_section_of_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "audit.yaml"
    file.write_text(load("audit.canary_users=7").to_yaml())
    assert AuditJobConfig.load(file).audit.canary_users == 7
    config = ExperimentConfig.load(file)
    assert audit_of(config) is None
    assert config.digest() == ExperimentConfig.load(DEMO).digest()


def test_a_run_named_in_a_settings_file_is_refused() -> None:
    """It would be named in the report, and its settings would not be taken."""
    config = load("of=runs/a")
    with pytest.raises(ConfigError, match="in the settings file: give it as --of"):
        require_option_of(config, ["--config", "a.yaml"])
    require_option_of(config, ["--of=runs/a"])


def test_many_canaries_do_not_move_an_adaptive_clip_norm() -> None:
    adaptive = ["privacy.clipping=adaptive", "privacy.mechanism=independent", "privacy.bands=1"]
    load(*adaptive, "audit.canary_users=3807")
    with pytest.raises(ConfigError, match=r"audit\.canary_users is 3808, above a quarter"):
        load(*adaptive, "audit.canary_users=3808")


@pytest.mark.parametrize("arguments", [["--of", "runs/a"], ["--of=runs/a"]])
def test_the_settings_of_a_run_are_those_of_its_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--of runs/a holds no config\.yaml"):
        with_settings_of([*arguments, "--output", "b"])
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    found = with_settings_of([*arguments, "--output", "b"])
    assert found == ["--config", "runs/a/config.yaml", *arguments, "--output", "b"]
    assert with_settings_of(["--config", "c.yaml"]) == ["--config", "c.yaml"]
    assert with_settings_of(["--of"]) == ["--of"]  # the parser says that its value is missing
    with pytest.raises(ConfigError, match="leave --config out"):
        with_settings_of([*arguments, "--config=c.yaml"])
