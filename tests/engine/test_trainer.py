"""Training one's own module on one's own tensors: pytest tests/engine/test_trainer.py"""

from __future__ import annotations

import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.own_module import (
    judged,
    make_model,
    make_plan,
    make_users,
    sgd,
    squared_error,
    train_on_rank,
    trained,
    weights,
)
from udp_ray.dp.keys import RunKey
from udp_ray.engine import InMemoryAccountant, Trainer, group_by_user
from udp_ray.engine.distributed import join_world
from udp_ray.errors import (
    CheckpointError,
    ConfigError,
    FencedError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
    UnsupportedModelError,
)
from udp_ray.ledger import Digests, Ledger, LedgerAccountant, plan_digest

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("own_*.py"))
ROUNDING = 2e-6
"""Float32 weights of about 1 after a few steps, against a judge in float64."""
KEPT = 1 - 2.0**-10
"""Share of the clip norm that groups are clipped to; the rest is for roundings."""
NOISY = {"noise_multiplier": 1.0, "delta": 1e-3}


# ---- the promise of a short program


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_of_under_20_lines_trains_and_states_what_it_spent(example, capsys):
    code = example.read_text().partition('"""\n')[2].splitlines()
    assert len([line for line in code if line.strip()]) < 20
    runpy.run_path(str(example))
    said = capsys.readouterr().out
    assert "promised   epsilon = 8, delta = 0.0001 for 10 steps" in said
    assert "spent      epsilon = 8, delta = 0.0001 for 10 steps" in said


def test_there_is_an_example_with_numbers_and_one_with_text():
    assert [path.stem for path in EXAMPLES] == ["own_module", "own_text_model"]


# ---- what a step computes


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("microbatch_rows", [1, 64])
def test_the_weights_are_those_of_a_plain_loop_over_users(optimizer, microbatch_rows):
    rate = 0.5 if optimizer == "sgd" else 0.01
    found = trained(
        make_users(), make_plan(), settings=sgd(optimizer=optimizer, learning_rate=rate),
        microbatch_rows=microbatch_rows,
    )  # fmt: skip
    clip = 0.5 * KEPT
    right = judged(make_users(), clip=clip, divisor=6, rate=rate, steps=3, name=optimizer)
    assert (found - right).abs().max() < ROUNDING
    unclipped = judged(make_users(), clip=1e9, divisor=6, rate=rate, steps=3, name=optimizer)
    assert (found - unclipped).abs().max() > 1000 * ROUNDING


def test_under_els_each_example_is_clipped_by_itself():
    users = make_users()
    examples = [[example] for user in users for example in user]
    number = len(examples)
    plan = make_plan(sampling="els", num_examples=number, expected_size=number)
    found = trained(users, plan)
    right = judged(examples, clip=0.5 * KEPT, divisor=number, rate=0.5, steps=3)
    by_user = judged(users, clip=0.5 * KEPT, divisor=number, rate=0.5, steps=3)
    assert (found - right).abs().max() < ROUNDING
    assert (found - by_user).abs().max() > 1000 * ROUNDING


@pytest.mark.parametrize("removed", range(6))
def test_removing_one_user_moves_the_sum_by_at_most_the_clip_norm(removed):
    plan = make_plan(num_steps=1)
    users = make_users()
    others = users[:removed] + users[removed + 1 :]
    assert moved_sum(users, others, plan) <= plan.clip_norm


def test_without_clipping_one_user_moves_the_sum_further():
    users = make_users()
    assert moved_sum(users, users[1:], make_plan(num_steps=1, clip_norm=math.inf)) > 5.0


def moved_sum(users, others, plan):
    """Returns how far apart the sums of one step are."""
    one, other = (trained(some, plan, settings=sgd(learning_rate=1.0)) for some in (users, others))
    return float((one - other).double().norm()) * plan.divisor


def test_two_ranks_give_the_weights_of_one():
    plan = make_plan(expected_size=3, **NOISY)
    one, two = trained(make_users(), plan), run_on_ranks(2, train_on_rank, plan)
    assert all((found - one).abs().max() < ROUNDING for found in two)


@pytest.mark.parametrize("differing", ["fewer", "reordered"])
def test_ranks_with_different_users_are_refused(differing):
    sizes = [len(user) for user in make_users()]
    assert sizes[0] == sizes[4]  # what is reordered has the same numbers of examples
    with pytest.raises(WorldFailed) as failure:
        run_on_ranks(2, train_on_rank, make_plan(), differing)
    assert {type(error) for error in failure.value.errors.values()} == {ConfigError}


# ---- noise and sampling


def test_the_noise_has_the_scale_of_the_plan_and_not_another():
    """40,000 values: a sound scale fails with a probability below 1e-6, 2/3 and 3/2 surely."""
    plan = make_plan(num_steps=1, expected_size=3, **NOISY)
    assert is_scale(noise_in_one_step(plan), plan)
    for factor in (2 / 3, 3 / 2):
        assert not is_scale(noise_in_one_step(replace(plan, noise_multiplier=factor)), plan)


def noise_in_one_step(plan):
    """Returns how far a step of learning rate 1 moves weights whose gradient is zero."""
    model = nn.Linear(200, 200, bias=False)
    before = weights(model)

    def zero(model, batch):
        return model(batch).sum(dim=1) * 0

    users = [[torch.ones(200)] for _ in range(6)]
    settings = sgd(learning_rate=1.0)
    Trainer(model, loss=zero, users=users, plan=plan, settings=settings).train()
    return (weights(model) - before).double().numpy()


def is_scale(values, plan):
    test = stats.kstest(values, stats.norm(scale=plan.clip_norm * 1.0 / plan.divisor).cdf)
    return test.pvalue > 1e-6


def test_users_take_part_at_the_rate_that_is_priced_and_not_another():
    """2,000 users, 20 steps: a sound rate fails with a probability below 1e-6, 1.1 times surely."""
    plan = make_plan(expected_size=100, population=2000, num_steps=20, group_size=1, delta=1e-4)
    drawn = num_drawn(plan)
    assert stats.binomtest(drawn, 2000 * 20, plan.sampling_probability).pvalue > 1e-6
    assert stats.binomtest(drawn, 2000 * 20, 1.1 * plan.sampling_probability).pvalue < 1e-3


def num_drawn(plan):
    seen = []

    def count(examples):
        seen.append(len(examples))
        return default_collate(examples)

    users = [[torch.randn(2)] for _ in range(plan.population)]
    model = nn.Linear(2, 1)
    trainer = Trainer(
        model, loss=lambda model, x: model(x)[:, 0], users=users, plan=plan, settings=sgd(),
        key=RunKey.from_seed(1), collate=count,
    )  # fmt: skip
    trainer.train()
    return sum(seen) - 3 - 3 - 3  # less the synthetic examples of the start-up check


def test_runs_have_keys_of_their_own():
    plan = make_plan(**NOISY)
    one, other = (trained(make_users(), plan, key=None) for _ in range(2))
    assert (one - other).abs().max() > 1e-3


# ---- the budget


def test_a_run_whose_price_does_not_fit_is_refused_before_anything_moves():
    plan = make_plan(expected_size=3, **NOISY)
    accountant = InMemoryAccountant(epsilon=1.5 * plan.epsilon(), delta=2e-3)
    trained(make_users(), plan, accountant=accountant)
    assert accountant.spent.epsilon == plan.epsilon()
    model = make_model()
    again = Trainer(model, loss=squared_error, users=make_users(), plan=plan, accountant=accountant)
    with pytest.raises(PrivacyBudgetExceededError, match="is left in this accountant"):
        again.train()
    assert torch.equal(weights(model), weights(make_model()))
    assert accountant.spent.epsilon == plan.epsilon()


class Ending(InMemoryAccountant):
    """An accountant that grants two steps."""

    def authorize(self, step, starting_checkpoint):
        if step > 2:
            raise PrivacyBudgetExceededError("step 3 would overspend")
        super().authorize(step, starting_checkpoint)


def test_when_the_budget_ends_the_steps_taken_are_kept_and_stated():
    plan = make_plan(expected_size=3, **NOISY)
    model = make_model()
    trainer = Trainer(
        model, loss=squared_error, users=make_users(), plan=plan, accountant=Ending(),
        evaluate=lambda model: {"heldout/loss": 1.0},
    )  # fmt: skip
    result = trainer.train()
    assert (result.num_steps, result.charged_steps) == (2, 2)
    assert result.epsilon == plan.epsilon(2) < plan.epsilon()
    text = result.to_text()
    assert "step 3 would overspend" in text
    assert f"promised   epsilon = {plan.epsilon():.4g}" in text
    assert f"spent      epsilon = {plan.epsilon(2):.4g}" in text
    assert [metrics["step"] for metrics in result.metrics] == [0, 2]
    assert all("heldout/loss" in metrics for metrics in result.metrics)


@pytest.mark.parametrize(
    "found", [None, 1.0, {"heldout/loss": "low"}, {"heldout/loss": None},
              {"heldout/loss": torch.ones(2)}],
)  # fmt: skip
def test_an_evaluation_that_returns_no_numbers_is_refused_before_anything_is_spent(found):
    accountant = InMemoryAccountant()
    trainer = Trainer(
        make_model(), loss=squared_error, users=make_users(), accountant=accountant,
        plan=make_plan(expected_size=3, **NOISY), evaluate=lambda model: found,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^evaluate returned \w+.*: have it return"):
        trainer.train()
    assert accountant._granted == 0


def test_the_text_states_what_all_runs_of_an_accountant_spent_together():
    plan = make_plan(expected_size=3, **NOISY)
    trainer = Trainer(make_model(), loss=squared_error, users=make_users(), plan=plan)
    first, second = trainer.train(), trainer.train()
    once, twice = f"{plan.epsilon():.4g}", f"{2 * plan.epsilon():.4g}"
    assert f"in total   epsilon = {once}, delta = 0.001 charged" in first.to_text()
    assert f"spent      epsilon = {once}, delta = 0.001 for 3 steps" in second.to_text()
    assert f"in total   epsilon = {twice}, delta = 0.002 charged" in second.to_text()


def test_a_run_in_memory_repeats_no_step():
    accountant = InMemoryAccountant()
    accountant.admit(make_plan())
    accountant.authorize(1, "digest")
    with pytest.raises(ReplayRefusedError, match="step 1 was granted before"):
        accountant.authorize(1, "digest")
    with pytest.raises(PrivacyBudgetExceededError, match="above the 3 steps"):
        accountant.authorize(4, "digest")


def test_an_accountant_in_memory_admits_no_key_twice():
    accountant, plan = InMemoryAccountant(), make_plan(**NOISY)
    for key in (accountant.admit(plan), accountant.admit(plan, RunKey.from_seed(3))):
        with pytest.raises(ReplayRefusedError, match="key was admitted before"):
            accountant.admit(plan, key)
    assert accountant.spent.epsilon == 2 * plan.epsilon()
    accountant.admit(plan, RunKey.from_seed(4))


def test_an_accountant_in_memory_knows_the_plan_that_it_admitted():
    accountant, plan = InMemoryAccountant(), make_plan(**NOISY)
    with pytest.raises(LedgerError, match="another plan"):
        accountant.require_plan(plan.to_dict())
    accountant.admit(plan)
    accountant.require_plan(plan.to_dict())
    with pytest.raises(LedgerError, match="another plan"):
        accountant.require_plan(replace(plan, noise_multiplier=0.5).to_dict())


# ---- a ledger, and resuming


PLAN = make_plan(expected_size=3, num_steps=7, **NOISY)
CORRELATED = make_plan(expected_size=2, num_steps=7, bands=3, strategy=(1.0, 0.6, 0.35), **NOISY)


def digests_of(plan):
    return Digests(plan=plan_digest(plan.to_dict()), config="c", code="c", store="s")


DIGESTS = digests_of(PLAN)


class Stopped(Exception):
    """What ends an attempt before a step."""


class StoppingAccountant(LedgerAccountant):
    """A ledger's accountant that is interrupted once it has reserved a step."""

    stop_at = 0

    def authorize(self, step, starting_checkpoint):
        super().authorize(step, starting_checkpoint)
        if step == self.stop_at:
            raise Stopped


@pytest.fixture
def plan():
    return PLAN


@pytest.fixture
def ledger(tmp_path, plan):
    with Ledger.create(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        ledger.register_dataset("chats")
        ledger.admit(
            "run", "chats", epsilon=plan.epsilon(), delta=plan.delta, num_steps=plan.num_steps,
            plan=plan.to_dict(), digests=digests_of(plan), key=RunKey.from_seed(3),
        )  # fmt: skip
        yield ledger


def attempt_with(
    ledger, folder, *, stop_at=0, users=None, loss=squared_error, microbatch_rows=64, plan=PLAN
):
    attempt = ledger.begin_attempt("run", digests_of(plan))
    accountant = StoppingAccountant(ledger, attempt)
    accountant.stop_at = stop_at
    model = make_model()
    trainer = Trainer(
        model, loss=loss, users=users or make_users(), plan=plan, settings=sgd(momentum=0.5),
        accountant=accountant, attempt=attempt, key=ledger.key(attempt), checkpoints=folder,
        microbatch_rows=microbatch_rows,
    )  # fmt: skip
    return trainer.train(), weights(model)


def test_a_run_continues_from_its_checkpoint_to_the_same_bits_and_pays_once(ledger, tmp_path):
    undisturbed = trained(make_users(), PLAN, settings=sgd(momentum=0.5))
    with pytest.raises(Stopped):
        attempt_with(ledger, tmp_path / "checkpoints", stop_at=6)
    result, found = attempt_with(ledger, tmp_path / "checkpoints")
    assert torch.equal(found, undisturbed)
    assert (result.num_steps, result.charged_steps) == (7, 7)
    record = ledger.run("run")
    assert (record.charged_steps, record.committed_step, record.num_keys) == (7, 7, 1)
    assert Path(result.checkpoint).is_dir()
    assert "kept in memory" not in result.to_text()
    assert "in total" not in result.to_text()


@pytest.mark.parametrize("plan", [CORRELATED], ids=["correlated noise"])
@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_run_with_correlated_noise_continues_to_the_same_bits(ledger, tmp_path, plan, stop_at):
    undisturbed = trained(make_users(), plan, settings=sgd(momentum=0.5))
    with pytest.raises(Stopped):
        attempt_with(ledger, tmp_path / "checkpoints", stop_at=stop_at, plan=plan)
    result, found = attempt_with(ledger, tmp_path / "checkpoints", plan=plan)
    assert torch.equal(found, undisturbed)
    assert (result.num_steps, result.charged_steps) == (7, 7)
    independent = trained(make_users(), make_plan(expected_size=2, num_steps=7, **NOISY))
    assert (found - independent).abs().max() > 1000 * ROUNDING


def test_two_ranks_give_the_weights_of_one_with_correlated_noise():
    one, two = trained(make_users(), CORRELATED), run_on_ranks(2, train_on_rank, CORRELATED)
    assert all((found - one).abs().max() < ROUNDING for found in two)


def test_a_repeated_step_on_other_users_is_refused_before_any_commit(ledger, tmp_path):
    with pytest.raises(Stopped):
        attempt_with(ledger, tmp_path, stop_at=1)
    with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
        attempt_with(ledger, tmp_path, users=make_users()[1:])


def other_loss(model, batch):
    return 2 * squared_error(model, batch)


@pytest.mark.parametrize(
    "other", [{"users": make_users()[1:]}, {"loss": other_loss}, {"microbatch_rows": 2}]
)
def test_a_run_does_not_continue_with_another_loss_or_other_users(ledger, tmp_path, other):
    with pytest.raises(Stopped):
        attempt_with(ledger, tmp_path, stop_at=6)
    with pytest.raises(CheckpointError, match="trained with another plan, model, loss"):
        attempt_with(ledger, tmp_path, **other)


def scaled_error(model, batch, scale):
    return scale * squared_error(model, batch)


class ScaledError:
    """A loss that is an object."""

    def __init__(self, scale):
        self.scale = scale
        self.itself = self

    def __call__(self, model, batch):
        return scaled_error(model, batch, self.scale)


@dataclass(frozen=True, slots=True)
class ScaledBySlot:
    """A loss that is an object without a dictionary."""

    scale: float

    def __call__(self, model, batch):
        return scaled_error(model, batch, self.scale)


class ScaledModule(nn.Module):
    """A loss that is a module."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, model, batch):
        return scaled_error(model, batch, self.scale)


def digest_of(ledger, **changes):
    attempt = ledger.begin_attempt("run", DIGESTS)
    given = {"loss": squared_error, "users": make_users(), "plan": PLAN} | changes
    trainer = Trainer(
        make_model(), accountant=LedgerAccountant(ledger, attempt), attempt=attempt, **given
    )
    return trainer._inputs_digest(RunKey.from_seed(3), join_world())


LOSSES = {
    "keyword": lambda scale: partial(scaled_error, scale=scale),
    "place": lambda scale: partial(lambda scale, *rest: scaled_error(*rest, scale), scale),
    "array": lambda scale: partial(scaled_error, scale=np.append(np.zeros(2000), [scale] * 2000)),
    "tensor": lambda scale: partial(scaled_error, scale=torch.full((4000,), scale)),
    "object": ScaledError,
    "slots": ScaledBySlot,
    "module": ScaledModule,
    "nested": lambda scale: partial(ScaledError(partial(scaled_error, scale=scale))),
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_the_digest_of_inputs_depends_on_what_a_loss_holds(ledger, make):
    assert digest_of(ledger, loss=make(1.0)) == digest_of(ledger, loss=make(1.0))
    assert digest_of(ledger, loss=make(1.0)) != digest_of(ledger, loss=make(2.0))


def test_the_digest_of_inputs_depends_on_the_function_of_a_partial(ledger):
    one, other = (digest_of(ledger, loss=partial(loss)) for loss in (squared_error, other_loss))
    assert one != other


@pytest.mark.parametrize(
    "change", [lambda x: x + (np.arange(x.size) == 2000), np.float32, lambda x: x.reshape(2, -1)],
    ids=["values", "type", "shape"],
)  # fmt: skip
def test_the_digest_of_inputs_depends_on_arrays(ledger, change):
    values = np.zeros(4000)
    same, equal, changed = (
        digest_of(ledger, users=[[x]]) for x in (values, values.copy(), change(values))
    )
    assert same == equal != changed


def test_a_run_removes_its_own_uncommitted_checkpoints_and_no_others(ledger, tmp_path):
    folder = tmp_path / "checkpoints"
    trained(make_users(), PLAN, checkpoints=folder)  # another run, in memory
    others = sorted(folder.rglob("step-*"))
    with pytest.raises(Stopped):
        attempt_with(ledger, folder, stop_at=6)
    uncommitted = folder / "run" / "step-00000005-attempt-1"
    uncommitted.mkdir()
    attempt_with(ledger, folder)
    assert not uncommitted.exists()
    assert others
    assert all(path.exists() for path in others)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 0.5}, {"expected_size": 4}, {"num_steps": 8}], ids=str
)
def test_a_plan_that_the_ledger_did_not_admit_is_refused_before_a_step(ledger, tmp_path, change):
    attempt = ledger.begin_attempt("run", DIGESTS)
    given = {
        "accountant": LedgerAccountant(ledger, attempt), "attempt": attempt,
        "key": ledger.key(attempt), "checkpoints": tmp_path / "checkpoints",
    }  # fmt: skip
    with pytest.raises(LedgerError, match="another privacy plan"):
        trained(make_users(), replace(PLAN, **change), **given)
    assert ledger.run("run").charged_steps == 0
    trained(make_users(), PLAN, **given)


def test_a_fenced_attempt_removes_no_checkpoint_of_a_newer_one(ledger, tmp_path):
    old = ledger.begin_attempt("run", DIGESTS)
    ledger.begin_attempt("run", DIGESTS)
    mine, newer = (tmp_path / "run" / f"step-00000002-attempt-{n}" for n in (1, 2))
    for folder in (mine, newer):
        folder.mkdir(parents=True)
    with pytest.raises(FencedError):
        trained(
            make_users(), PLAN, accountant=LedgerAccountant(ledger, old), attempt=old,
            key=RunKey.from_seed(3), checkpoints=tmp_path,
        )  # fmt: skip
    assert (mine.exists(), newer.exists()) == (False, True)


def test_committed_checkpoints_are_kept_where_the_folder_has_another_path(ledger, tmp_path):
    with pytest.raises(Stopped):
        attempt_with(ledger, tmp_path / "checkpoints", stop_at=6)
    names = {path.name for path in (tmp_path / "checkpoints" / "run").glob("step-*")}
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "elsewhere")
    attempt_with(ledger, tmp_path / "elsewhere")
    assert names <= {path.name for path in (tmp_path / "elsewhere" / "run").glob("step-*")}


def test_a_ledger_is_not_used_without_its_key_or_a_folder(ledger, tmp_path):
    attempt = ledger.begin_attempt("run", DIGESTS)
    given = {"accountant": LedgerAccountant(ledger, attempt)}
    with pytest.raises(ConfigError, match="attempt or its key is missing"):
        trained(make_users(), PLAN, **given)
    with pytest.raises(ConfigError, match="attempt or its key is missing"):
        trained(make_users(), PLAN, attempt=attempt, key=RunKey.generate(), **given)
    with pytest.raises(ConfigError, match="checkpoints is missing"):
        trained(make_users(), PLAN, attempt=attempt, key=ledger.key(attempt), **given)
    with pytest.raises(ConfigError, match="attempt belongs to a ledger"):
        trained(make_users(), PLAN, attempt=attempt)


# ---- what is refused


class Counting(nn.Module):
    """Adds a little more to each output than to the one before."""

    def __init__(self, *, in_buffer):
        super().__init__()
        self.inner = make_model()
        self.calls = 0
        if in_buffer:
            self.register_buffer("total", torch.zeros(1))

    def forward(self, x):
        if "total" in self._buffers:
            self.total += x.detach().mean()
            return self.inner(x) + 0 * self.total
        self.calls += 1
        return self.inner(x)


class Centering(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x):
        return x - x.mean(dim=0)


MEMORY = []


class Remembering(nn.Module):
    """Keeps what it has seen outside of itself."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, x):
        MEMORY.append(x.detach().mean())
        return self.inner(x) * (1 + len(MEMORY))


REFUSED = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
                   r"1 \(BatchNorm1d\) mixes the examples"),
    "float64": (lambda: make_model().double(), "call model.float"),
    "nothing trains": (lambda: make_model().requires_grad_(False), "no parameter with"),
    "a buffer": (lambda: Counting(in_buffer=True), "changed total"),
    "a number": (lambda: Counting(in_buffer=False), "changed calls"),
    "mixed examples": (lambda: nn.Sequential(nn.Linear(4, 8), Centering(), nn.Linear(8, 1)),
                       "than each of them alone"),
    "memory elsewhere": (Remembering, "keeps state"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_breaks_the_promise_is_refused_before_it_is_charged_a_step(case):
    make, words = REFUSED[case]
    asked = InMemoryAccountant()
    with pytest.raises(UnsupportedModelError, match=words):
        Trainer(
            make(), loss=squared_error, users=make_users(), plan=make_plan(), accountant=asked
        ).train()
    assert asked._granted == 0


def root(model, batch):
    return model(batch[0])[:, 0].sub(1e9).sqrt()


def test_a_loss_that_is_not_finite_on_synthetic_examples_is_refused():
    """Otherwise any module would pass, because NaN is above no tolerance."""
    asked = InMemoryAccountant()
    for model in (make_model(), nn.Sequential(nn.Linear(4, 8), Centering(), nn.Linear(8, 1))):
        with pytest.raises(UnsupportedModelError, match="is not finite, so that nothing can be"):
            Trainer(
                model, loss=root, users=make_users(), plan=make_plan(), accountant=asked
            ).train()
    assert asked._granted == 0


def test_dropout_and_layer_norm_are_accepted():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 1))
    Trainer(model, loss=squared_error, users=make_users(), plan=make_plan()).train()


class Late(nn.Module):
    """Has a buffer that only some data change, as no start-up check can foresee."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if x.abs().max() > 100:
            self.seen += 1
        return self.inner(x)


class LateReplaced(Late):
    """Deletes the buffer, and makes another, which may be put where the old one was."""

    def forward(self, x):
        if x.abs().max() > 100:
            value = float(self.seen) + 1
            del self.seen
            self.register_buffer("seen", torch.full((1,), value))
        return self.inner(x)


class LateDeleted(Late):
    """Deletes the buffer."""

    def forward(self, x):
        if x.abs().max() > 100 and "seen" in self._buffers:
            del self.seen
        return self.inner(x)


@pytest.mark.parametrize("kind", [Late, LateReplaced, LateDeleted])
def test_a_buffer_that_private_data_change_ends_training(kind):
    users = [*make_users(), [(torch.full((4,), 1000.0), torch.ones(1))]]
    with pytest.raises(UnsupportedModelError, match="the buffer seen of the model changed"):
        Trainer(kind(), loss=squared_error, users=users, plan=make_plan()).train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"users": []}, "users holds no examples"),
        ({"users": [[], []]}, "users holds no examples"),
        ({"plan": make_plan(delta=0.16)}, "not below 1 / users"),
        ({"settings": sgd(zero_stage=2)}, "train.zero_stage is 2"),
        ({"settings": sgd(kernel="ghost")}, "train.kernel is ghost"),
        ({"loss": lambda model, batch: squared_error(model, batch).mean()}, "one value per"),
        ({"plan": make_plan(max_cohort_size=6), "users": make_users(7)}, "population is 6"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(changes, words):
    given = {"users": make_users(7), "plan": make_plan(), "loss": squared_error} | changes
    with pytest.raises(ConfigError, match=words):
        Trainer(make_model(), **given).train()


# ---- data and environment


def test_users_may_be_a_mapping_of_parts_of_a_dataset():
    xs = torch.randn(10, 4)
    dataset = TensorDataset(xs, xs.sum(dim=1, keepdim=True))
    ids = ["b", "a", "b", "c", "a", "a", "b", "c", "c", "c"]
    users = group_by_user(dataset, ids)
    assert {user: len(part) for user, part in users.items()} == {"a": 3, "b": 3, "c": 4}
    for part, user in ((users[user], user) for user in users):
        expected = [xs[place] for place, each in enumerate(ids) if each == user]
        assert all(torch.equal(part[k][0], row) for k, row in enumerate(expected))
    listed = [
        [dataset[i] for i, each in enumerate(ids) if each == user] for user in ("b", "a", "c")
    ]
    plan = make_plan(expected_size=3, population=3)
    assert torch.equal(trained(users, plan), trained(listed, plan))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0, 0, 1, 1]),
        list(torch.tensor([0, 0, 1, 1])),
        np.array([0, 0, 1, 1]),
        list(np.array([0, 0, 1, 1])),
    ],
    ids=["a tensor", "tensors", "an array", "scalars of numpy"],
)
def test_ids_in_tensors_and_arrays_count_by_value(ids):
    users = group_by_user(TensorDataset(torch.arange(4)), ids)
    assert {user: len(part) for user, part in users.items()} == {0: 2, 1: 2}
    assert all(type(user) is int for user in users)


def test_ids_may_be_tuples_of_tensors():
    ids = [(torch.tensor(place // 2), "a") for place in range(4)]
    users = group_by_user(TensorDataset(torch.arange(4)), ids)
    assert {user: len(part) for user, part in users.items()} == {(0, "a"): 2, (1, "a"): 2}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 0, 1], "3 ids for 4 examples"),
        ([0, 0, 1, 1, 1], "5 ids for 4 examples"),
        ([0, 0, 1, None], "no value at place 3"),
        (torch.tensor([0.0, math.nan, 1.0, 1.0]), "no value at place 1"),
        ([0, 0, (1, math.nan), 1], "no value at place 2"),
        ([0, 0, [1], 1], "a list at place 2"),
        (torch.zeros(4, 2), "a list at place 0"),
        ([object()] * 4, "an object without equality at place 0"),
    ],
    ids=["too few", "too many", "none", "nan", "nan in a tuple", "a list", "rows", "an object"],
)
def test_ids_that_name_no_user_are_refused(ids, words):
    with pytest.raises(ConfigError, match=words):
        group_by_user(TensorDataset(torch.arange(4)), ids)


def test_a_step_without_users_is_noised_like_any_other():
    plan = make_plan(expected_size=1, population=10**9, delta=1e-10, noise_multiplier=1.0)
    assert (trained(make_users(), plan) - weights(make_model())).abs().max() > 0.1


def test_it_trains_where_there_is_no_deepspeed_and_no_ray():
    program = (
        "import sys; sys.modules['deepspeed'] = sys.modules['ray'] = None\n"
        "from tests.support.own_module import *\n"
        "trained(make_users(), make_plan())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_package_of_the_engine_loads_no_torch():
    program = "import sys, udp_ray.engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_offsets_count_examples_user_after_user():
    trainer = Trainer(make_model(), loss=squared_error, users=make_users(), plan=make_plan())
    offsets = trainer._users.user_offsets
    assert np.array_equal(np.diff(offsets), [len(user) for user in make_users()])
