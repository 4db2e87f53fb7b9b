"""pytest tests/engine/test_loop.py"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.support import training_deaths
from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import (
    RecordingAccountant,
    TinyRun,
    attempt_at,
    run_loop,
    tiny_model,
    train_tiny,
    write_tiny_store,
)
from tests.support.training_deaths import (
    RUN_ID,
    Death,
    make_ledger,
    train_refused,
    train_with_ledger,
)
from udp_ray.dp.keys import RunKey
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import join_world
from udp_ray.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    FencedError,
    LedgerError,
    ReplayRefusedError,
)
from udp_ray.ledger.ledger import Ledger


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), num_steps=5, checkpoint_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def whole(run, folder):
    return train_tiny(run, checkpoints=str(folder))


def told(outcome):
    return [event[1] for event in outcome.events if event[0] == "metrics"]


def test_each_step_is_authorized_and_metrics_leave_after_their_commit(whole):
    order = [(e[0], e[1]["step"] if e[0] == "metrics" else e[1]) for e in whole.events]
    assert order == [
        ("metrics", 0),
        ("authorize", 1), ("authorize", 2), ("publish", 2), ("commit", 2), ("metrics", 2),
        ("authorize", 3), ("authorize", 4), ("publish", 4), ("commit", 4), ("metrics", 4),
        ("authorize", 5), ("publish", 5), ("commit", 5), ("metrics", 5),
    ]  # fmt: skip


def test_a_step_names_the_last_committed_checkpoint_as_its_start(whole):
    committed = checkpoint.weights_digest(dict(tiny_model().named_parameters()))
    for event in whole.events:
        if event[0] == "authorize":
            assert event[2] == committed
        if event[0] == "commit":
            committed = event[3]
    assert whole.result.digest == committed


def test_the_result_names_a_checkpoint_of_the_final_weights(whole):
    assert (whole.result.step, whole.result.budget_message) == (5, None)
    saved = checkpoint.read(Path(whole.result.location), expected_digest=whole.result.digest)
    assert saved.step == 5
    assert all(np.array_equal(saved.weights[n], w) for n, w in whole.weights.items())
    assert saved.key_id == RunKey.from_seed(7).id


def test_metrics_are_public_numbers_and_nothing_else(whole):
    assert set(told(whole)[-1]) == {
        "step", "train/learning_rate", "heldout/token_loss", "heldout/user_loss",
        "heldout/token_perplexity", "heldout/user_perplexity", "heldout/num_tokens",
        "heldout/num_users", "heldout/num_examples", "heldout/stored_users",
        "heldout/stored_examples",
    }  # fmt: skip


def test_when_the_budget_ends_the_steps_taken_are_kept(run):
    ended = train_tiny(run, last_step=3)
    assert ended.result.step == 3
    assert "step 4 would overspend" in ended.result.budget_message
    assert [event[1] for event in ended.events if event[0] == "commit"] == [2, 3]
    assert told(ended)[-1]["step"] == 3


def test_when_the_budget_ends_at_a_checkpoint_it_is_evaluated(run):
    ended = train_tiny(run, last_step=2)
    assert [event[1] for event in ended.events if event[0] == "commit"] == [2]
    assert "heldout/token_loss" in told(ended)[-1]


def test_without_any_budget_nothing_moves(run):
    ended = train_tiny(run, last_step=0)
    assert (ended.result.step, ended.result.location) == (0, None)
    assert all(np.array_equal(w, p.detach()) for w, p in pairs(ended))


def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_bits(run, whole, folder):
    resumed = train_tiny(run, resume=resume_point(whole, 2))
    assert [event[1] for event in resumed.events if event[0] == "authorize"] == [3, 4, 5]
    assert all(np.array_equal(resumed.weights[n], w) for n, w in whole.weights.items())
    assert resumed.result.digest == whole.result.digest
    assert told(resumed)[0]["step"] == 4  # the weights of step 0 are not there any more


def test_a_run_resumed_after_its_last_step_is_evaluated_and_takes_none(run, whole):
    resumed = train_tiny(run, resume=resume_point(whole, 5))
    assert [event[0] for event in resumed.events] == ["metrics"]
    assert resumed.result == whole.result


# ---- resuming with a smaller checkpoint_every


STOPPED_AT = 7


class Stopped(Exception):
    """What ends an attempt after a step was reserved."""


@pytest.fixture(scope="module")
def rare(run):
    """Ten steps, a checkpoint after every fourth."""
    return replace(run, num_steps=10, checkpoint_every=4)


@pytest.fixture
def frequent(rare, tmp_path, monkeypatch):
    """The run after it stopped with steps 5 to 7 reserved from step 4, now with more commits."""

    def stop() -> None:
        raise Stopped

    monkeypatch.setattr(training_deaths, "die", stop)
    make_ledger(url_in(tmp_path), rare)
    with pytest.raises(Stopped):
        train_with_ledger(rare, url_in(tmp_path), str(tmp_path), Death(authorize=STOPPED_AT))
    return replace(rare, checkpoint_every=1)


def url_in(folder):
    return f"sqlite:///{folder / 'ledger.sqlite'}"


def test_a_run_resumed_with_more_checkpoints_commits_once_reserved_steps_are_repeated(
    rare, frequent, tmp_path
):
    resumed = train_with_ledger(frequent, url_in(tmp_path), str(tmp_path))
    assert [event[1] for event in resumed.events if event[0] == "publish"] == [7, 8, 9, 10]
    assert [metrics["step"] for metrics in told(resumed)] == [7, 8, 9, 10]
    assert all("heldout/token_loss" in metrics for metrics in told(resumed))
    undisturbed = train_tiny(rare)
    assert all(np.array_equal(resumed.weights[n], w) for n, w in undisturbed.weights.items())
    with Ledger.open(url_in(tmp_path)) as ledger:
        record = ledger.run(RUN_ID)
    assert (record.charged_steps, record.committed_step, record.num_keys) == (10, 10, 1)


def test_a_loop_that_commits_between_reserved_steps_is_stopped_before_harm(frequent, tmp_path):
    with pytest.raises(LedgerError, match=r"step 5 .* before step 7 is repeated"):
        train_with_ledger(frequent, url_in(tmp_path), str(tmp_path), defers_commits=False)
    resumed = train_with_ledger(frequent, url_in(tmp_path), str(tmp_path))
    assert resumed.result.step == 10


def test_committing_between_reserved_steps_would_end_the_run_for_good(
    frequent, tmp_path, monkeypatch
):
    """The failing arm: neither the loop defers its commits nor does the ledger refuse them."""
    monkeypatch.setattr(Ledger, "_refuse_commit_between_reserved", lambda *_: None)
    for defers_commits in (False, True):  # the second attempt does it right, in vain
        with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
            train_with_ledger(
                frequent, url_in(tmp_path), str(tmp_path), defers_commits=defers_commits
            )


# ---- refusals


def test_a_resume_point_of_another_step_is_refused(run, whole):
    with pytest.raises(CheckpointError, match="holds step 2"):
        train_tiny(run, resume=replace(resume_point(whole, 2), resume_step=3))


def test_another_checkpoint_than_the_ledgers_is_refused(run, whole):
    wrong = replace(resume_point(whole, 2), resume_digest=whole.result.digest)
    with pytest.raises(CheckpointError, match="not the one that the ledger recorded"):
        train_tiny(run, resume=wrong)


def test_weights_that_do_not_move_are_an_error(run):
    with pytest.raises(ConfigError, match=r"train\.learning_rate is too small"):
        train_tiny(replace(run, learning_rate=1e-46))


def test_an_infinite_update_is_an_error(run):
    with pytest.raises(DivergedError, match=r"train\.learning_rate is too large"):
        train_tiny(replace(run, learning_rate=3e38, noise_multiplier=10.0))


class DivergedAfter(RecordingAccountant):
    """An accountant that has seen the evaluation of a step fail."""

    def __init__(self, events, step):
        super().__init__(events)
        self._step = step

    def authorize(self, step, starting_checkpoint):
        if step > self._step:
            raise DivergedError(f"after step {self._step} the loss is not a number")
        super().authorize(step, starting_checkpoint)


def test_training_that_diverged_takes_no_further_step(run, tmp_path):
    events = []
    ended = run_loop(run, DivergedAfter(events, 2), events, tmp_path)
    (commit,) = [event for event in events if event[0] == "commit"]
    assert (ended.result.step, ended.result.digest) == (2, commit[3])
    assert [event[1] for event in events if event[0] == "authorize"] == [1, 2]
    assert "not a number" in ended.result.budget_message


def test_training_does_not_go_on_from_weights_that_are_not_finite(run, whole, tmp_path):
    point = resume_point(whole, 2)
    broken = tmp_path / "checkpoint"
    shutil.copytree(point.resume_checkpoint, broken)
    weights = load_file(broken / checkpoint.WEIGHTS)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, broken / checkpoint.WEIGHTS)
    manifest = json.loads((broken / checkpoint.MANIFEST).read_text())
    content = (broken / checkpoint.WEIGHTS).read_bytes()
    manifest["files"][checkpoint.WEIGHTS] = hashlib.sha256(content).hexdigest()
    text = json.dumps(manifest)
    (broken / checkpoint.MANIFEST).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(DivergedError, match="weights of step 2 are not finite"):
        train_tiny(run, resume=replace(point, resume_checkpoint=str(broken), resume_digest=digest))


def test_a_refusal_stops_all_ranks_with_the_same_error(run):
    with pytest.raises(WorldFailed) as failure:
        run_on_ranks(2, train_refused, run)
    assert {rank: type(error) for rank, error in failure.value.errors.items()} == {
        0: FencedError, 1: FencedError,
    }  # fmt: skip


def test_training_says_nothing_private(run, caplog, capfd):
    """Neither logs nor output: whatever is said, no number of this run may depend on the data."""
    with caplog.at_level(logging.DEBUG):
        train_tiny(run)
    ours = [record for record in caplog.records if record.name.startswith("udp_ray")]
    assert not ours
    assert not any(line.strip() for line in capfd.readouterr().out.splitlines())


def resume_point(outcome, step):
    location, digest = next(
        event[2:] for event in outcome.events if event[0] == "commit" and event[1] == step
    )
    return attempt_at(step, location, digest)


def pairs(outcome):
    return [(outcome.weights[n], p) for n, p in tiny_model().named_parameters()]
