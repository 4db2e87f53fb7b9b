"""Settings from a YAML file and overrides, as a notebook loads them."""

from pathlib import Path

import pytest

from udp_ray.config.audit import AuditJobConfig
from udp_ray.config.base import SECTIONS
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.errors import ConfigError

SETTINGS = """
privacy: {epsilon: 8, delta: 1.0e-5, clip_norm: 1.0, cohort_size: 20, num_steps: 5}
data: {name: chats, store: build/chats}
model: {name: some-model}
output: out
sweep: {release: all, group_size: [1, 2]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS)
    return path


def test_overrides_win_over_the_file_in_both_spellings(file: Path) -> None:
    assert ExperimentConfig.load(file).privacy.epsilon == 8
    as_mapping = ExperimentConfig.load(file, {"privacy.epsilon": 2.0, "model.lora.rank": 4})
    as_texts = ExperimentConfig.load(str(file), ["privacy.epsilon=2.0", "model.lora.rank=4"])
    assert as_mapping == as_texts
    assert as_mapping.model.lora is not None
    assert (as_mapping.privacy.epsilon, as_mapping.model.lora.rank) == (2.0, 4)


def test_texts_are_read_as_yaml(file: Path) -> None:
    asked = ["privacy.epsilon=null", "privacy.noise_multiplier=1e-1", "data.input=[a.csv, b=c.csv]"]
    config = ExperimentConfig.load(file, asked)
    assert (config.privacy.epsilon, config.privacy.noise_multiplier) == (None, 0.1)
    assert config.data.input == ["a.csv", "b=c.csv"]


def test_settings_need_no_file(file: Path) -> None:
    values = {
        "privacy.epsilon": 8, "privacy.delta": 1e-5, "privacy.clip_norm": 1, "data.name": "chats",
        "privacy.cohort_size": 20, "privacy.num_steps": 5, "data.store": "build/chats",
        "model.name": "some-model", "output": "out",
    }  # fmt: skip
    assert ExperimentConfig.load(None, values) == ExperimentConfig.load(file)


def test_each_settings_class_takes_its_own_sections_of_a_file(file: Path) -> None:
    assert SweepJobConfig.load(file, ["sweep.group_size=4"]).sweep.group_size == [4]
    assert AuditJobConfig.load(file, ["audit.seed=4"]).audit.seed == 4
    jobs = set(SweepJobConfig.model_fields) | set(AuditJobConfig.model_fields) - {"of"}
    assert set(ExperimentConfig.model_fields) | jobs == SECTIONS


def test_what_was_loaded_is_written_and_read_as_the_same(file: Path, tmp_path: Path) -> None:
    config = ExperimentConfig.load(file, ["train.learning_rate=0.5"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert ExperimentConfig.load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["privacy.epsilon"], ["'privacy.epsilon'", "no value", "privacy.epsilon=8"]),
        ("privacy.epsilon=8", ["overrides", "list"]),
        ({"privacy.epsilon": 0}, ["privacy.epsilon is 0", "greater than 0"]),
        ({"privacy.epsilons": 1}, ["privacy.epsilons", "did you mean privacy.epsilon?"]),
        ({"privacy": 1}, ["section 'privacy' is 1"]),
        ({"data.heldout": 1.5}, ["data.heldout is 1.5", "between 0 and 1"]),
        ({"output.folder": "x"}, ["output"]),
        ({"privacy.population": 10}, ["privacy.cohort_size", "lower it"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_field(file: Path, overrides, names) -> None:
    with pytest.raises(ConfigError) as refused:
        ExperimentConfig.load(file, overrides)
    assert all(name in str(refused.value) for name in names), refused.value
    assert "\n" not in str(refused.value)
    assert "--" not in str(refused.value)


def test_a_missing_file_and_a_missing_setting_are_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"settings file nowhere\.yaml: No such file"):
        ExperimentConfig.load("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"^section 'privacy' is missing: give it in the file$"):
        ExperimentConfig.load(None, {"output": "x"})


@pytest.mark.parametrize(
    "overrides",
    [
        "data.ledger=postgresql://u:hunter2@h/db",
        ["data.ledger:postgresql://u:hunter2@h/db"],
        ["data.name=2024-13-01"],
        ["data.name=" + "[" * 5000],
        {1: 2},
    ],
    ids=["one text", "no value", "no date", "nested", "a number as name"],
)
def test_an_override_that_cannot_be_read_is_one_sentence_without_passwords(overrides) -> None:
    with pytest.raises(ConfigError) as refused:
        ExperimentConfig.load(None, overrides)
    assert "hunter2" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)
