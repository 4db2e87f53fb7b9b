"""A run on Ray that publishes the average of its weights. A few minutes on 2 cores.

pytest tests/on_ray/test_train_average.py -m slow
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.runs import tiny_experiment, to_folder, with_storage
from udp_ray.data.store import TokenStore
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate
from udp_ray.errors import ReplayRefusedError
from udp_ray.io import OutputFolder
from udp_ray.on_ray.train import train
from udp_ray.runs.admission import admit, prepare_run

ROUNDING = 1e-4
"""Losses of about 4 on another number of ranks and microbatches."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_2_cpus")]


@pytest.mark.parametrize("stage", [0, 3])
def test_the_published_model_is_the_average_that_was_evaluated(tmp_path: Path, stage: int) -> None:
    averaging = {"average": "tail", "average_share": 0.5, "publish": "average"}
    train_settings = averaging | {"zero_stage": stage}
    config = tiny_experiment(tmp_path, train=train_settings)
    config = with_storage(to_folder(config, tmp_path / "average"), tmp_path / "checkpoints")
    result = train(config, announce=lambda text: None)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    heldout = TokenStore.open(config.data.store, verify=False).heldout
    assert heldout is not None
    found = evaluate(model, heldout, world=join_world(), microbatch_tokens=64)
    last = result.metrics[-1]
    assert found.token_loss == pytest.approx(last["average_token_loss"], abs=ROUNDING)
    assert found.token_loss != pytest.approx(last["token_loss"], abs=ROUNDING)  # the failing arm
    (place,) = (tmp_path / "checkpoints").glob(f"{result.run_id}/checkpoint-00000006-*")
    average = load_file(place / checkpoint.AVERAGE)
    for name, weight in model.named_parameters():
        assert (weight.double() - average[name]).abs().max() < 1e-6


def test_a_run_is_not_resumed_with_another_average(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, train={"average": "ema"})
    run = prepare_run(config, OutputFolder(Path(config.output)), run_id="test-run")
    admit(run, resume=False)
    for change in ({"average": "none"}, {"average_decay": 0.5}, {"publish": "average"}):
        settings = config.train.model_copy(update=change)
        other = config.model_copy(update={"train": settings})
        with pytest.raises(ReplayRefusedError, match="another config"):
            train(other, resume=True, announce=lambda text: None)
