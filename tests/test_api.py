"""The public API: importing it is light, and what it offers is complete, typed and documented."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import udp_ray
from udp_ray.errors import ConfigError, UdpRayError

FUNCTIONS = ("generate", "prepare", "sweep", "train", "verify")


def test_every_public_name_is_loaded_when_it_is_used() -> None:
    for name in udp_ray.__all__:
        assert getattr(udp_ray, name).__doc__, name
        assert name in dir(udp_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        udp_ray.tarin  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_typed_and_says_what_it_takes_returns_and_raises(name: str) -> None:
    function = getattr(udp_ray, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in (inspect.getdoc(function) or "")


def test_the_version_is_that_of_the_package() -> None:
    pyproject = Path(udp_ray.__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    assert udp_ray.__version__ == project["version"]


def test_types_are_shipped() -> None:
    assert (Path(udp_ray.__file__).parent / "py.typed").is_file()


def test_settings_plan_and_price_need_no_data_torch_or_cluster() -> None:
    program = """
import sys, udp_ray
config = udp_ray.ExperimentConfig.load("jobs/configs/demo.yaml", {"privacy.epsilon": 4.0})
plan = udp_ray.PrivacyPlan.from_config(config.privacy, num_users=config.privacy.population)
assert plan.epsilon() <= 4.0
print(*{"torch", "ray", "sqlalchemy", "deepspeed", "transformers"} & set(sys.modules))
"""
    root = Path(udp_ray.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == ""


def test_a_mistake_in_an_override_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilom") as caught:
        udp_ray.ExperimentConfig.load(None, {"privacy.epsilom": 1.0})
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_statement_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UdpRayError, match=r"privacy\.json"):
        udp_ray.verify(tmp_path)
