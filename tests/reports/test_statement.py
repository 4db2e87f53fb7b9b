"""What a statement says: everything an auditor needs, and loudly what voids it."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from udp_ray.config.audit import AuditConfig
from udp_ray.config.experiment import TrainConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import DataError
from udp_ray.ledger.records import Budget
from udp_ray.reports.statement import (
    DatasetTotal,
    PrivacyStatement,
    RunIdentity,
    describe_averaging,
    load_statement,
)

RUN = RunIdentity(
    run_id="chats-1f",
    config_digest="c" * 64,
    code_digest="d" * 64,
    store_digest="e" * 64,
    ledger_id="ledger-7",
    ledger_url="sqlite:////data/ledger.sqlite",
    git_commit="a1b2c3",
)
TOTAL = DatasetTotal("chats", num_runs=3, spent=Budget(11.0, 3e-6), total=Budget(20.0, 1e-5))


def statement(**changes: object) -> PrivacyStatement:
    settings = {
        "epsilon": 4.0,
        "delta": 1e-5,
        "clip_norm": 0.5,
        "cohort_size": 20,
        "group_size": 3,
        "num_steps": 50,
        "population": 2000,
    }
    privacy = PrivacyConfig.model_validate(settings | changes)
    return PrivacyStatement.promise(privacy, plan_of(privacy))


@cache
def plan_of(privacy: PrivacyConfig) -> PrivacyPlan:
    return PrivacyPlan.from_config(privacy, num_users=None)


def test_a_promise_names_unit_adjacency_mechanism_and_every_number() -> None:
    text = statement().to_text()
    for needed in (
        "user: all examples of one user", "add or remove one user", "Poisson", "epsilon = 4",
        "1e-05", "clip norm C", "0.5", "group size G", "steps T", "50", "2000", "0.01", "PLD",
        "declared", "promised",
    ):  # fmt: skip
        assert needed in text, needed
    assert "NO GUARANTEE" not in text


def test_a_finished_statement_also_names_run_ledger_totals_and_what_is_not_covered() -> None:
    page = statement().with_spent(num_steps=50).of_run(RUN, TOTAL).to_markdown()
    for needed in (
        "chats-1f", "ledger-7", "cccccccccccccccc", "dddddddddddddddd", "a1b2c3", "Held-out users",
        "pretrained", "3 runs", "epsilon = 11", "epsilon = 20", "dp-accounting", "Side channels",
        "50 of 50 steps charged", "only those that the ledger has committed",
        "For the operator only are the store, the ledger, the storage of checkpoints",
        "how long all of them took",
    ):  # fmt: skip
        assert needed in page, needed


def test_correlated_noise_is_named_and_its_steps_are_spent_in_rounds() -> None:
    banded = statement(mechanism="banded", bands=5)
    text = banded.to_text()
    for needed in (
        "users in 5 bands, one band a step",
        "correlated Gaussian noise (banded matrix factorization), 50 steps",
        "5: a user is in at most 10 steps, b or more apart",
        "strategy c",
    ):
        assert needed in " ".join(text.split()), needed
    assert "banded" not in statement().to_text()
    spent = [banded.with_spent(num_steps=steps).spent for steps in (5, 6, 10)]
    assert spent[0].epsilon < spent[1].epsilon == spent[2].epsilon
    read = PrivacyStatement.from_dict(json.loads(banded.to_json()))
    assert read.plan == banded.plan
    assert read.to_json() == banded.to_json()


@pytest.mark.parametrize("publish", ["last", "average"])
def test_an_average_is_named_and_said_to_be_free(publish: str, tmp_path: Path) -> None:
    train = TrainConfig(average="tail", average_share=0.25, publish=publish)
    averaging = describe_averaging(train)
    found = replace(statement(), averaging=averaging)
    for text in (found.to_text(), found.to_markdown()):
        words = " ".join(text.split())
        assert "mean over the last 0.25 of the steps" in words
        assert f"the model is the {'average' if publish == 'average' else 'last weights'}" in words
        assert "post-processing), so it costs nothing" in words
    found.save(tmp_path)
    assert load_statement(tmp_path / "privacy.json") == found
    assert found.promised == statement().promised
    assert describe_averaging(TrainConfig()) is None
    assert "averaging" not in statement().to_dict()  # statements without it are as before


def test_a_statement_says_what_an_example_is_if_the_store_was_opened(tmp_path: Path) -> None:
    joined = "texts of one user, joined in the order of a keyed hash up to 128 tokens"
    promised = replace(statement(), example=joined)
    assert joined in " ".join(promised.to_text().split())
    promised.save(tmp_path)
    assert PrivacyStatement.load(tmp_path / "privacy.json") == promised
    assert "joined" not in statement().to_text()


def test_a_counted_population_is_said_to_be_taken_as_public() -> None:
    privacy = PrivacyConfig(
        noise_multiplier=1.0, delta=1e-5, clip_norm=1.0, cohort_size=20, num_steps=5
    )
    plan = PrivacyPlan.from_config(privacy, num_users=2000)
    counted = PrivacyStatement.promise(privacy, plan)
    assert "taken as public" in counted.to_text()
    assert any("taken as public" in line for line in counted.to_dict()["assumptions"])


def test_spent_is_what_the_charged_steps_cost_and_never_above_the_promise() -> None:
    promised = statement()
    half = promised.with_spent(num_steps=25)
    whole = promised.with_spent(num_steps=50)
    assert half.spent is not None
    assert whole.spent is not None
    assert half.spent.epsilon == promised.plan.epsilon(25)
    assert 0 < half.spent.epsilon < whole.spent.epsilon <= promised.promised.epsilon
    assert promised.with_spent(num_steps=0).spent == Budget(0.0, 0.0)


def test_a_seed_voids_the_statement() -> None:
    seeded = statement(seed=3)
    assert not seeded.is_guarantee
    assert "NO GUARANTEE" in seeded.to_text()
    assert "differentially private" not in seeded.to_markdown().split("##")[0]


def test_a_run_without_noise_is_said_to_have_no_guarantee() -> None:
    bare = statement(
        epsilon=None, noise_multiplier=0.0, clip_norm=math.inf, accept_no_guarantee=True
    ).with_spent(num_steps=50)
    assert "NO GUARANTEE" in bare.to_text()
    assert "epsilon = inf" in bare.to_markdown()
    assert bare.to_dict()["is_guarantee"] is False
    json.loads(bare.to_json(), parse_constant=pytest.fail)  # strict JSON holds no Infinity
    assert PrivacyStatement.from_dict(json.loads(bare.to_json())) == bare


def test_a_dataset_that_lost_its_guarantee_is_said_to_have() -> None:
    lost = DatasetTotal("chats", num_runs=2, spent=Budget(math.inf, 1e-6))
    assert "NO GUARANTEE LEFT" in statement().of_run(RUN, lost).to_text()


def test_json_gives_the_same_statement_back(tmp_path: Path) -> None:
    whole = statement().with_spent(num_steps=40).of_run(RUN, TOTAL)
    whole.save(tmp_path)
    assert PrivacyStatement.load(tmp_path / "privacy.json") == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["privacy.json", "statement.md"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "not valid JSON"),
        (lambda text: text.replace('"promised"', '"promise"'), "not a privacy statement"),
        (lambda text: text.replace('"clip_norm": 0.5', '"clip_norm": 5'), "changed by hand"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "schema version"),
    ],
)
def test_a_damaged_statement_is_refused_in_one_sentence(
    damage, message: str, tmp_path: Path
) -> None:
    statement().with_spent(num_steps=40).of_run(RUN, TOTAL).save(tmp_path)
    file = tmp_path / "privacy.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(DataError, match=message):
        PrivacyStatement.load(file)


def test_a_missing_statement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        PrivacyStatement.load(tmp_path / "privacy.json")


def test_a_statement_says_which_noise_it_rests_on():
    plain, secure = statement(secure_noise=False), statement()
    assert "Philox" in plain.to_text()
    assert "ChaCha20" in secure.to_text()
    assert "privacy.secure_noise" in plain.to_markdown()
    assert "Unknown floating-point attacks" in secure.to_markdown()
    assert secure.to_dict()["plan"]["secure_noise"] is True


def test_a_promise_warns_of_a_tight_cap_on_the_cohort():
    tight = statement(population=2_000, max_cohort_size=21)
    assert "privacy.max_cohort_size is 21" in tight.to_text()
    assert "privacy.max_cohort_size" not in "".join(tight.with_spent(num_steps=1).warnings())


def test_a_statement_says_how_gradients_are_clipped_and_comes_back():
    settings = {"noise_multiplier": 1.0, "delta": 1e-6, "clip_norm": 0.5, "cohort_size": 100}
    for clipping, words in {
        "automatic": "multiplied by C / (norm + 0.01 C)",
        "adaptive": "noise is 1.005 C, so that both together have noise multiplier 1",
    }.items():
        privacy = PrivacyConfig(**settings, num_steps=10, clipping=clipping)
        plan = PrivacyPlan.from_config(privacy, num_users=10_000)
        statement = PrivacyStatement.promise(privacy, plan)
        assert words in " ".join(statement.to_text().split())
        assert PrivacyStatement.from_dict(json.loads(statement.to_json())).plan == plan


# ---- audited runs


def test_an_audited_run_says_so_and_is_not_for_release_unless_accepted() -> None:
    privacy = PrivacyConfig.model_validate(
        {
            "epsilon": 4.0,
            "delta": 1e-5,
            "clip_norm": 0.5,
            "cohort_size": 20,
            "group_size": 3,
            "num_steps": 50,
            "population": 2000,
        }
    )
    for accepts in (False, True):
        audit = AuditConfig(canary_users=1200, accept_canaries=accepts)
        promised = PrivacyStatement.promise(privacy, plan_of(privacy), audit=audit)
        done = promised.with_spent(num_steps=50).of_run(RUN, TOTAL)
        for text in (promised.to_text(), done.to_text(), done.to_markdown()):
            words = " ".join(text.split())
            assert "made for a white box audit: each of 1,200 synthetic users" in words
            assert ("NOT FOR RELEASE" in words) is not accepts
        assert done.to_dict()["audit"] == {
            "num_canaries": 1200, "box": "white", "is_accepted": accepts,
        }  # fmt: skip
        assert PrivacyStatement.from_dict(json.loads(done.to_json())).audit == done.audit
        assert done.is_guarantee


def test_a_run_that_is_no_audit_says_nothing_of_canaries() -> None:
    plain = statement().with_spent(num_steps=50)
    assert "audit" not in plain.to_dict()
    assert "synthetic" not in plain.to_text()
    damaged = plain.to_dict() | {"audit": {"num_canaries": "many", "box": "white"}}
    with pytest.raises(DataError, match=r"audit\.num_canaries is 'many', no int"):
        PrivacyStatement.from_dict(damaged)
