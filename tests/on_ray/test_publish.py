"""What a run leaves, and that it ends: also one whose training diverged. Without a cluster.

pytest tests/on_ray/test_publish.py
"""

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.support.runs import DATASET, tiny_experiment
from tests.support.training import tiny_model
from udp_ray.engine import checkpoint
from udp_ray.errors import ConfigError, DivergedError, LedgerError, StorageError
from udp_ray.io import OutputFolder
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import RunRecord
from udp_ray.on_ray import publish as publishing
from udp_ray.on_ray import train as training
from udp_ray.on_ray.accountant import RunAccountant
from udp_ray.on_ray.train import execute, train
from udp_ray.reports.verify import verify
from udp_ray.runs.admission import Run, admit, prepare_run
from udp_ray.runs.result import RunResult

NUM_STEPS = 6
TAKEN = 2
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that is admitted and has taken no step."""
    config = tiny_experiment(tmp_path, privacy={"num_steps": NUM_STEPS})
    run = prepare_run(config, OutputFolder(Path(config.output)), run_id="test-run")
    admit(run, resume=False)
    return run


def heldout(step: int, loss: float, perplexity: float | None = None) -> dict[str, float]:
    other = math.exp(min(loss, 700.0)) if perplexity is None else perplexity
    return {
        "step": step, "heldout/token_loss": loss, "heldout/user_loss": loss,
        "heldout/token_perplexity": other, "heldout/user_perplexity": other,
        "heldout/num_tokens": 50, "heldout/num_users": 6,
    }  # fmt: skip


def write_checkpoint(folder: Path, *, broken: float | None, has_average: bool = False) -> str:
    """Writes the tiny model as a checkpoint of step 2, with one weight broken; returns its digest.

    Its average, if it has one, is twice its weights.

    Written by hand, so that it does not depend on an engine that refuses such weights.
    """
    folder.mkdir()
    weights = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    if broken is not None:
        next(iter(weights.values())).view(-1)[3] = broken
    save_file(weights, folder / checkpoint.WEIGHTS)
    save_file({}, folder / checkpoint.OPTIMIZER)
    if has_average:
        twice = {name: 2 * weight.double() for name, weight in weights.items()}
        save_file(twice, folder / checkpoint.AVERAGE)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    text = json.dumps(
        {"format": checkpoint.FORMAT, "step": TAKEN, "key_id": "k", "provenance": {},
         "files": files} | ({"average": "of a test"} if has_average else {})
    )  # fmt: skip
    (folder / checkpoint.MANIFEST).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def executed(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    *,
    loss: float = 3.0,
    perplexity: float | None = None,
    broken: float | None = None,
    stopped_by: DivergedError | None = None,
    said: list[str] | None = None,
) -> RunResult:
    """Executes a run, with two steps that are played instead of trained, or one that failed."""

    def play(run: Run, accountant: RunAccountant, announce: object) -> DivergedError | None:
        attempt = accountant.begin()
        assert attempt is not None
        accountant.record_metrics(attempt.number, heldout(0, 4.0))
        accountant.authorize(attempt.number, 1, "start")
        if stopped_by is not None:
            return stopped_by
        accountant.authorize(attempt.number, TAKEN, "start")
        place = run.folder.path / "checkpoint"
        has_average = run.config.train.averaging is not None
        digest = write_checkpoint(place, broken=broken, has_average=has_average)
        accountant.commit(attempt.number, TAKEN, str(place), digest)
        metrics = heldout(TAKEN, loss, perplexity)
        if has_average:
            metrics |= {
                name.replace("heldout/", "heldout_average/"): value - 0.5
                for name, value in metrics.items()
                if name != "step"
            }
        accountant.record_metrics(attempt.number, metrics)
        return None

    monkeypatch.setattr(training, "start_accountant", RunAccountant)
    monkeypatch.setattr(training, "RemoteAccountant", lambda actor: actor)
    monkeypatch.setattr(training, "_train", play)
    announce: Callable[[str], None] = (lambda text: None) if said is None else said.append
    return execute(run, resume=False, announce=announce)


def ended(run: Run) -> RunRecord:
    """Returns the record of a run after it was seen to have ended, without a key, and charged."""
    record = run.ledger.run(run.run_id)
    assert record.state == "finished"
    file = run.ledger.url.removeprefix("sqlite:///")
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT secret FROM udp_ray_keys").fetchall() == [(None,)]
    assert run.ledger.spent(DATASET).spent == run.statement.promised
    return record


def strict(file: Path) -> object:
    return json.loads(file.read_text(), parse_constant=pytest.fail)


DIVERGED = {
    "weights that are not a number": ({"loss": NAN, "broken": NAN}, "step 2 the loss .* number"),
    "infinite weights": ({"loss": NAN, "broken": INFINITY}, "step 2 the loss .* number"),
    "an infinite loss": ({"loss": INFINITY}, "step 2 the loss .* infinite"),
    "weights that evaluation never reads": ({"broken": NAN}, "weights of step 2 are not finite"),
    "the first step": ({"stopped_by": DivergedError("the first step was too far")}, "too far"),
}


@pytest.mark.parametrize(("played", "words"), DIVERGED.values(), ids=DIVERGED)
def test_a_run_that_diverged_ends_charged_and_without_a_key_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, played: dict, words: str
) -> None:
    said: list[str] = []
    with pytest.raises(DivergedError, match=words) as caught:
        executed(run, monkeypatch, said=said, **played)
    assert "train.learning_rate" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not any("resume" in text for text in [*said, str(caught.value)])
    assert any("TRAINING DIVERGED" in text for text in said)
    record = ended(run)
    output = run.folder.path
    privacy = strict(output / "privacy.json")
    assert privacy["spent"] == privacy["promised"]  # not less: it ended early by its own outputs
    assert privacy["num_steps_spent"] == record.charged_steps < NUM_STEPS
    assert strict(output / "error.json") == {"error": str(caught.value), "diverged": True}
    assert strict(output / "metrics.json")[0]["token_loss"] == 4.0
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    has_weights = played == DIVERGED["an infinite loss"][0]
    assert privacy["has_weights"] is (output / "model.safetensors").exists() is has_weights
    verdict = verify(output)
    assert verdict.agrees, verdict.to_text()
    with pytest.raises(ConfigError, match="has ended"):
        train(run.config, resume=True, announce=lambda text: None)


def test_not_a_number_is_null_in_what_is_published(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DivergedError):
        executed(run, monkeypatch, loss=NAN, broken=NAN)
    row = strict(run.folder.path / "metrics.json")[-1]
    assert (row["step"], row["token_loss"], row["token_perplexity"]) == (TAKEN, None, None)


def test_a_run_with_an_infinite_perplexity_is_published_as_any_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    result = executed(run, monkeypatch, loss=900.0, perplexity=INFINITY, said=said)
    ended(run)
    assert strict(result.output / "metrics.json")[-1]["token_perplexity"] == "inf"
    assert "inf" in result.to_text()
    assert not (result.output / "error.json").exists()
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert torch.equal(model.transformer.wte.weight, tiny_model().transformer.wte.weight)


@pytest.mark.parametrize("publish", ["last", "average"])
def test_the_average_is_published_if_the_settings_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: str
) -> None:
    config = tiny_experiment(
        tmp_path, privacy={"num_steps": NUM_STEPS}, train={"average": "ema", "publish": publish}
    )
    run = prepare_run(config, OutputFolder(Path(config.output)), run_id="test-run")
    admit(run, resume=False)
    result = executed(run, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    factor = 2 if publish == "average" else 1
    assert torch.equal(model.transformer.wte.weight, factor * tiny_model().transformer.wte.weight)
    first, last = strict(result.output / "metrics.json")
    assert "average_token_loss" not in first
    assert (last["token_loss"], last["average_token_loss"]) == (3.0, 2.5)
    assert result.loss == (2.5 if publish == "average" else 3.0)
    text = " ".join(result.to_text().split())
    assert ("weights, averaged over the steps" in text) is (publish == "average")
    assert "average: token loss" in text
    assert "2.5000" in text
    scalars = (result.output / "tensorboard").glob("*")
    assert any(b"heldout_average/token_loss" in file.read_bytes() for file in scalars)
    assert "so it costs nothing" in (result.output / "statement.md").read_text()
    assert verify(result.output).agrees


def test_an_average_that_is_not_finite_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_experiment(
        tmp_path,
        privacy={"num_steps": NUM_STEPS},
        train={"average": "ema", "publish": "average"},
    )
    run = prepare_run(config, OutputFolder(Path(config.output)), run_id="test-run")
    admit(run, resume=False)
    with pytest.raises(DivergedError, match="are not finite"):
        executed(run, monkeypatch, broken=NAN)
    assert not (run.folder.path / "model.safetensors").exists()


def test_a_run_that_could_not_be_written_has_not_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm: what fails before the end leaves a run that is resumed, with its key."""

    def refuse(*arguments: object) -> bytes:
        raise StorageError("no room")

    monkeypatch.setattr(publishing, "write_atomic", refuse)
    said: list[str] = []
    with pytest.raises(StorageError):
        executed(run, monkeypatch, loss=NAN, said=said)
    assert "--resume" in said[-1]
    assert run.ledger.run(run.run_id).state == "admitted"


def test_numbers_as_json_does_not_know_them_would_keep_a_run_from_ending(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm: metrics written as they are."""
    monkeypatch.setattr(publishing, "to_strict_json", lambda row: row)
    with pytest.raises(ValueError, match="JSON compliant"):
        executed(run, monkeypatch, loss=NAN)
    assert run.ledger.run(run.run_id).state == "admitted"


def test_a_run_that_diverged_cannot_be_begun_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DivergedError):
        executed(run, monkeypatch, loss=NAN)
    with pytest.raises(LedgerError, match="destroyed"):
        run.ledger.begin_attempt(run.run_id, run.digests)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_training_that_diverges_on_workers_stops_at_the_next_evaluation_and_ends(
    tmp_path: Path,
) -> None:
    # Each step multiplies the weights by about -1e19: finite after two, and of no use to the loss.
    config = tiny_experiment(tmp_path, train={"weight_decay": 2e19})
    with pytest.raises(DivergedError, match="after step 2 the loss on held-out users"):
        train(config, announce=lambda text: None)
    output = Path(config.output)
    privacy = strict(output / "privacy.json")
    assert (privacy["num_steps_spent"], privacy["spent"]) == (2, privacy["promised"])
    assert verify(output).agrees
    with Ledger.open(config.data.ledger_url) as ledger:
        (record,) = ledger.spent(DATASET).runs
        assert (record.state, record.charged_steps) == ("finished", 2)
