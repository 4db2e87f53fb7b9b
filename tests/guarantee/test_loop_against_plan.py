"""The training loop draws, checks, noises and evaluates what its plan priced, for each sampler.

    pytest tests/guarantee/test_loop_against_plan.py

What was priced is read from the plan's event, not from the plan's other fields. False alarms: 1e-6
for each statistical check, over the choice of the seed, which is fixed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from scipy import stats

from tests.support import observed
from tests.support.distributed import run_on_ranks
from tests.support.observed import (
    SEED,
    Observed,
    numbered,
    observe,
    plain_sgd,
    write_numbered_store,
)
from tests.support.statistics import (
    FALSE_ALARM,
    agrees_with_binomial,
    agrees_with_frequencies,
    agrees_with_normal,
)
from tests.support.training import attempt_at, tiny_model
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import PoissonExampleSampler, PoissonUserSampler
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate
from udp_ray.engine.loop import cohorts
from udp_ray.errors import GuaranteeError, NoiseCheckError

KEY = RunKey.from_seed(4).sampling()
NUM_USERS = 400
NUM_STEPS = 600
SIZES = [1 + user % 5 for user in range(NUM_USERS)]

# Declared numbers that are not the store's: what is drawn must follow the declared ones.
ULS = PrivacyPlan(
    sampling="uls", noise_multiplier=0.8, clip_norm=0.5, group_size=2, num_steps=6,
    expected_size=25, population=500, population_is_declared=True, delta=1e-4,
)  # fmt: skip
ELS = replace(ULS, sampling="els", expected_size=40, num_examples=1000)
CAPPED = replace(ULS, max_cohort_size=20)  # binds in every other step
PLANS = {"uls": ULS, "els": ELS, "uls with a cap": CAPPED}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def priced_rate(plan):
    """The chance of a user (els: a kept example) to be in a step for which the event charges."""
    step = plan.dp_event().event
    if isinstance(step, dp_event.MixtureOfGaussiansDpEvent):  # over Binomial(G, p)
        none = step.sampling_probs[list(step.sensitivities).index(0)]
        return 1 - none ** (1 / max(step.sensitivities))
    return step.sampling_probability


def faster(plan, factor=1.2):
    """The failing arm: a plan that samples more often than was paid for."""
    pool = "population" if plan.sampling == "uls" else "num_examples"
    return replace(plan, **{pool: round(getattr(plan, pool) / factor)})


# ---- what is drawn, by its frequencies


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = write_numbered_store(tmp_path_factory.mktemp("large") / "store", SIZES)
    return TokenStore.open(path, verify=False)


def draws_of(plan, store):
    draw = cohorts(plan, KEY, store)
    return [draw(step) for step in range(1, NUM_STEPS + 1)]


def users_of(cohort, store):
    """The user of each group; every group holds examples of one user."""
    owners = np.searchsorted(store.user_offsets, cohort.examples, side="right") - 1
    groups = [owners[a:b] for a, b in pairwise(cohort.offsets)]
    assert all((group == group[0]).all() for group in groups)
    return [int(group[0]) for group in groups]


def user_rate(plan):
    """Chance of a user to be in a step under the price: the cap leaves a uniform subset."""
    if plan.max_cohort_size is None:
        return priced_rate(plan)
    sizes = np.minimum(np.arange(NUM_USERS + 1), plan.max_cohort_size)
    return float(sizes @ stats.binom.pmf(np.arange(NUM_USERS + 1), NUM_USERS, priced_rate(plan)))


def sizes_are_as_priced(plan, draws):
    num_units = len(np.unique(np.concatenate([draw.units for draw in draws])))
    if plan.sampling == "uls":
        num_units = NUM_USERS
    expected = NUM_STEPS * stats.binom.pmf(np.arange(num_units + 1), num_units, priced_rate(plan))
    if (cap := plan.max_cohort_size) is not None:
        expected = np.append(expected[:cap], expected[cap:].sum())
    sizes = np.bincount([len(draw.units) for draw in draws], minlength=len(expected))
    return len(sizes) == len(expected) and agrees_with_frequencies(sizes, expected)


def inclusions_are_as_priced(plan, draws):
    counts = np.bincount(np.concatenate([draw.units for draw in draws]))
    counts = counts[counts > 0] if plan.sampling == "els" else counts
    rate = user_rate(plan) / (NUM_USERS if plan.max_cohort_size else 1)
    if plan.max_cohort_size is None and not agrees_with_binomial(
        counts.sum(), trials=NUM_STEPS * len(counts), probability=rate
    ):
        return False
    return agrees_with_binomial(counts, trials=NUM_STEPS, probability=rate)


def favours_nobody(plan, draws):
    units = np.concatenate([draw.units for draw in draws])
    early = int((units < NUM_USERS // 2).sum())
    return agrees_with_binomial(early, trials=len(units), probability=0.5)


@plans
@pytest.mark.parametrize("claim", [sizes_are_as_priced, inclusions_are_as_priced])
def test_the_loop_samples_at_the_rate_that_the_event_charges_for(large, plan, claim):
    assert claim(plan, draws_of(plan, large))


@plans
def test_a_fifth_more_often_is_caught(large, plan):
    draws = draws_of(faster(plan), large)
    assert not sizes_are_as_priced(plan, draws)
    assert plan.max_cohort_size or not inclusions_are_as_priced(plan, draws)


def test_a_cap_keeps_users_wherever_they_stand_and_keeping_the_first_is_caught(large):
    assert favours_nobody(CAPPED, draws_of(CAPPED, large))
    first = [
        replace(draw, units=draw.units[: CAPPED.max_cohort_size]) for draw in draws_of(ULS, large)
    ]
    assert not favours_nobody(CAPPED, first)
    assert sizes_are_as_priced(CAPPED, first), "sizes alone would not tell"


@plans
def test_a_user_brings_distinct_examples_and_no_more_than_the_group_size(large, plan):
    most = np.minimum(SIZES, plan.group_size)
    ever = [set() for _ in SIZES]
    for draw in draws_of(plan, large):
        users = users_of(draw, large)
        for user, (a, b) in zip(users, pairwise(draw.offsets), strict=True):
            group = draw.examples[a:b].tolist()
            assert len(group) == len(set(group)) == (most[user] if plan.sampling == "uls" else 1)
            ever[user] |= set(group)
        if plan.sampling == "uls":
            assert len(users) == len(set(users))
    if plan.sampling == "els":  # the same examples for the whole run
        assert [len(examples) for examples in ever] == most.tolist()
    else:
        assert max(len(examples) for examples in ever) > plan.group_size


# ---- what reaches the kernel, in the loop as a whole

SMALL_SIZES = [1 + user % 5 for user in range(60)]
SMALL = {
    "uls": replace(ULS, expected_size=15, population=60),
    "els": replace(ELS, expected_size=15, population=60, num_examples=100),
    "uls with a cap": replace(ULS, expected_size=15, population=60, max_cohort_size=12),
}
small_plans = pytest.mark.parametrize("plan", SMALL.values(), ids=list(SMALL))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "store"
    return str(write_numbered_store(path, SMALL_SIZES, heldout=[2, 1, 4]))


def groups_to_expect(plan, store):
    """Steps of sorted groups of token rows, by a sampler at the rate of the event."""
    key, rate = RunKey.from_seed(SEED).sampling(), priced_rate(plan)
    offsets = TokenStore.open(store, verify=False).user_offsets
    if plan.sampling == "els":
        draw = PoissonExampleSampler(
            key, sampling_probability=rate, group_size=plan.group_size, user_offsets=offsets
        ).cohort
    else:
        sampler = PoissonUserSampler(
            key, sampling_probability=rate, group_size=plan.group_size,
            max_cohort_size=plan.max_cohort_size,
        )  # fmt: skip
        draw = lambda step: sampler.cohort(step, offsets)  # noqa: E731
    expected = {}
    for step in range(1, plan.dp_event().count + 1):
        cohort = draw(step)
        rows = [numbered(example) for example in cohort.examples.tolist()]
        expected[step] = sorted(sorted(rows[a:b]) for a, b in pairwise(cohort.offsets.tolist()))
    return expected


def in_order(groups):
    return {step: sorted(sorted(rows) for rows in of_step) for step, of_step in groups.items()}


@small_plans
def test_the_kernel_is_given_the_groups_of_the_priced_draw_at_each_step(small, plan):
    seen = observe(small, plan)
    assert in_order(seen.groups) == groups_to_expect(plan, small)
    assert groups_to_expect(faster(plan), small) != groups_to_expect(plan, small)


@small_plans
def test_two_ranks_share_the_groups_and_none_is_with_both(small, plan):
    ranks = run_on_ranks(2, observe, small, plan)
    together = {step: [*ranks[0].groups[step], *ranks[1].groups[step]] for step in ranks[0].groups}
    assert in_order(together) == groups_to_expect(plan, small)
    assert all(any(rank.groups.values()) for rank in ranks)


def test_a_step_whose_draw_is_empty_is_taken_and_noised_like_any_other(small):
    plan = never(ULS)
    seen = observe(small, plan)
    assert seen.groups == {step: [] for step in range(1, plan.num_steps + 1)}
    assert [e[1] for e in seen.of("authorize")] == list(range(1, plan.num_steps + 1))
    assert noise_steps(seen) == list(range(1, plan.num_steps + 1))


def never(plan):
    """A plan under which no user is ever drawn: a chance of 1e-9 for each."""
    return replace(plan, expected_size=1, population=10**9, delta=1e-12)


# ---- what the noise is, and when it is drawn


def noise_steps(seen):
    return list(dict.fromkeys(event[2] for event in seen.of("noise", "noise")))


def moves(seen):
    """How far the weights went, against the direction of what the optimizer was given."""
    before, after = seen.weights
    return np.concatenate([(before[n].astype(float) - after[n]).ravel() for n in before])


def released_as_priced(plan, found, added):
    """Whether the sum over steps of (clipped sum + noise) / divisor is the one that was priced."""
    run = plan.dp_event()
    step = getattr(run.event, "event", run.event)
    z = getattr(step, "noise_multiplier", getattr(step, "standard_deviation", None))
    stddev = z * plan.sensitivity() * np.sqrt(run.count) / plan.expected_size
    noise = found - added * run.count / plan.expected_size
    spread = found.size * noise.var() / stddev**2  # chi-squared, where it is sharper than the other
    tails = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], found.size)
    return agrees_with_normal(noise, stddev=stddev) and tails[0] < spread < tails[1]


ADDED = 8.0
"""In each value of each step's sum: 16 clip norms, so that a wrong divisor or step shows."""


@pytest.mark.parametrize("settings", [{}, {"fuse_reduce": True, "zero_stage": 1}], ids=str)
@small_plans
def test_noise_divisor_and_number_of_steps_are_the_plans(small, plan, settings):
    seen = observe(small, plan, settings=plain_sgd(**settings), added=ADDED)
    found = moves(seen)
    assert released_as_priced(plan, found, ADDED)
    # The failing arms: another scale, another divisor, a step more than was priced.
    for wrong in (
        replace(plan, noise_multiplier=1.1 * plan.noise_multiplier),
        replace(plan, expected_size=plan.expected_size + 1),
        replace(plan, num_steps=plan.num_steps + 1),
    ):
        assert not released_as_priced(wrong, found, ADDED)


@small_plans
def test_groups_are_clipped_to_the_clip_norm_less_what_roundings_of_the_sum_need(small, plan):
    (found,) = observe(small, plan).clip_norms
    assert found == plan.clip_norm * (1 - 2.0**-10)


def test_each_group_of_each_step_has_dropout_masks_of_its_own_that_a_repetition_shares(small):
    plan = replace(SMALL["uls"], num_steps=3)
    first, again = observe(small, plan).mask_seeds, observe(small, plan).mask_seeds
    assert first == again
    assert None not in first
    assert len(set(first)) == len(first) > 10


@small_plans
def test_a_step_is_authorized_before_its_noise_is_drawn_and_no_other_is_asked_for(small, plan):
    seen = observe(small, plan)
    steps = list(range(1, plan.num_steps + 1))
    assert [event[1] for event in seen.of("authorize")] == steps
    assert noise_steps(seen) == steps
    assert is_authorized_first(seen)
    reversed_order = Observed(events=[("noise", "noise", 1), ("authorize", 1, "digest")])
    assert not is_authorized_first(reversed_order)  # the failing arm


def is_authorized_first(seen):
    granted = set()
    for event in seen.events:
        if event[0] == "authorize":
            granted.add(event[1])
        if event[:2] == ("noise", "noise") and event[2] not in granted:
            return False
    return True


def test_no_noise_is_drawn_for_a_step_that_was_refused(small):
    seen = observe(small, SMALL["uls"], last_step=3)
    assert noise_steps(seen) == [event[1] for event in seen.of("authorize")] == [1, 2, 3]
    assert list(seen.groups) == [1, 2, 3]


@pytest.mark.parametrize("is_secure", [False, True])
def test_secure_noise_is_drawn_where_the_plan_says_so(small, is_secure):
    """Only secure noise is float64, before it is added."""
    seen = observe(small, replace(SMALL["uls"], secure_noise=is_secure))
    drawn = {event[3] for event in seen.of("noise")}
    assert drawn == {torch.float64 if is_secure else torch.float32}


def test_no_key_is_in_a_checkpoint(small, tmp_path):
    observe(small, SMALL["uls"], settings=plain_sgd(checkpoint_every=2), checkpoints=tmp_path)
    content = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    key = RunKey.from_seed(SEED)
    assert any(key.id.encode() in text for text in content), "its name is there"
    for secret in (key.secret, *(k.secret for k in (key.sampling(), key.noise(), key.selfcheck()))):
        assert not any(secret in text or secret.hex().encode() in text for text in content)


# ---- the check of the noise


def no_noise(step, noise, number):
    pass


def double_noise(step, noise, number):
    step._sum.add_noise(noise, number)
    step._sum.add_noise(noise, number)


@pytest.fixture(scope="module")
def resumable(small, tmp_path_factory):
    """A run stopped after step 2, whose checkpoint is there to go on from."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = plain_sgd(checkpoint_every=2)
    (_, step, location, digest) = observe(
        small, SMALL["uls"], settings=settings, last_step=2, checkpoints=folder
    ).of("commit")[-1]
    return attempt_at(step, location, digest)


@pytest.mark.parametrize("fault", [no_noise, double_noise])
@pytest.mark.parametrize("is_resumed", [False, True], ids=["fresh", "resumed"])
def test_wrong_noise_stops_a_run_before_anything_is_read_or_asked_for(
    small, resumable, fault, is_resumed
):
    seen = observe(
        small,
        SMALL["uls"],
        settings=plain_sgd(noise_buffer=0),
        noise_fault=fault,
        resume=resumable if is_resumed else None,
    )
    assert isinstance(seen.error, NoiseCheckError)
    assert not seen.groups
    assert {event[0] for event in seen.events} == {"noise"}


@pytest.mark.parametrize("fault", [no_noise, double_noise])
def test_noise_drawn_ahead_that_is_not_added_once_stops_a_run(small, fault):
    with pytest.raises(GuaranteeError, match=r"was not added|out of the order"):
        observe(small, SMALL["uls"], noise_fault=fault)


def test_the_check_draws_from_a_key_of_its_own_before_the_first_step(small, resumable):
    for resume in (None, resumable):
        seen = observe(small, SMALL["uls"], resume=resume)
        assert {event[2] for event in seen.of("noise", "selfcheck")} == {0}
        kinds = [event[0] for event in seen.events]
        assert kinds.index("noise") < min(map(kinds.index, ("read", "authorize")))
        assert seen.events[kinds.index("noise")][1] == "selfcheck"
        assert not seen.of("noise", "another")


# ---- what is evaluated


def reads(seen, store):
    return {event[2] for event in seen.of("read", store)}


@pytest.mark.parametrize("sampling", ["uls", "els"])
def test_evaluation_reads_the_heldout_users_and_no_others(small, sampling):
    """Where no user is drawn, every text of a training user that is read is read to evaluate."""
    plan = replace(never(ULS), sampling=sampling, num_examples=10**9)
    settings = plain_sgd(checkpoint_every=2, evaluate_examples="all")
    seen = observe(small, plan, settings=settings)
    assert not reads(seen, "train")
    assert reads(seen, "heldout") == set(range(2 + 1 + 4))
    first, *_, last = [event[1] for event in seen.of("metrics")]
    assert (first["step"], last["step"]) == (0, plan.num_steps)
    heldout = [
        [numbered(sum(SMALL_SIZES) + i) for i in user] for user in ([0, 1], [2], range(3, 7))
    ]
    assert first["heldout/num_users"] == last["heldout/num_users"] == len(heldout)
    assert first["heldout/token_loss"] == pytest.approx(mean_loss(heldout), rel=1e-5)


def test_every_evaluation_is_bounded_and_says_so(small):
    plan = never(ULS)
    seen = observe(small, plan, settings=plain_sgd(checkpoint_every=2, evaluate_examples=3))
    assert reads(seen, "heldout") == {0, 1, 2}
    told = [event[1] for event in seen.of("metrics")]
    assert {row["step"] for row in told} >= {0, plan.num_steps}
    for row in told:
        assert (row["heldout/num_users"], row["heldout/num_examples"]) == (2, 3)
        assert (row["heldout/stored_users"], row["heldout/stored_examples"]) == (3, 7)


def mean_loss(users):
    """Hugging Face's own loss of the initial weights; all examples have equally many tokens."""
    model = tiny_model().eval()
    with torch.no_grad():
        ids = torch.tensor([text for texts in users for text in texts])
        return float(model(input_ids=ids, labels=ids).loss)


def test_an_evaluation_of_training_users_would_be_seen(small):
    """The failing arm."""
    store, seen = TokenStore.open(small, verify=False), Observed()
    observed._watch_reads(store, "train", seen)
    evaluate(tiny_model(), store, world=join_world(), microbatch_tokens=64)
    assert reads(seen, "train") == set(range(sum(SMALL_SIZES)))


def test_without_heldout_users_nothing_is_evaluated(tmp_path):
    store = write_numbered_store(tmp_path / "store", SMALL_SIZES)
    seen = observe(str(store), never(ULS), settings=plain_sgd(checkpoint_every=2))
    assert not seen.of("read")
    assert not any(name.startswith("heldout/") for e in seen.of("metrics") for name in e[1])
