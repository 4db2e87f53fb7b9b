"""What jobs/price.py prints."""

import json

import pytest
import yaml
from pydantic import ValidationError
from transformers import GPT2Config

from jobs import price
from udp_ray.config.privacy import PricingConfig, PrivacyConfig
from udp_ray.data.store import MANIFEST_FILE, PrivateCounts, StoreCounts
from udp_ray.dp.plan import PricedPlan, PrivacyPlan
from udp_ray.errors import ConfigError
from udp_ray.reports.price import PriceConfig, price_of

PRIVACY = {
    "delta": 1e-6,
    "clip_norm": 1.0,
    "cohort_size": 100,
    "num_steps": 1000,
    "population": 10_000,
}


def options(**changes):
    settings = PRIVACY | changes
    return [part for name, value in settings.items() for part in (f"--privacy.{name}", str(value))]


def answer(arguments, capsys):
    assert price.main(["--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_noise_gives_epsilon_and_epsilon_gives_the_noise_back(capsys):
    given_noise = answer(options(noise_multiplier=1.0), capsys)
    assert given_noise["epsilon"] == pytest.approx(2.1245, abs=1e-3)
    given_epsilon = answer(options(epsilon=given_noise["epsilon"]), capsys)
    assert given_epsilon["noise_multiplier"] == pytest.approx(1.0, abs=1e-3)
    assert given_epsilon["epsilon"] <= given_noise["epsilon"]


def test_json_has_the_fields_that_scripts_rely_on(capsys):
    found = answer(options(noise_multiplier=1.0, group_size=7), capsys)
    expected = PRIVACY | {
        "sampling": "uls",
        "noise_multiplier": 1.0,
        "sampling_probability": 0.01,
        "group_size": 7,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_file_gives_the_settings_and_the_command_line_wins(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"privacy": PRIVACY | {"noise_multiplier": 1.0}}))
    found = answer(["--config", str(file), "--privacy.clip_norm", "0.5"], capsys)
    assert (found["clip_norm"], found["noise_multiplier"]) == (0.5, 1.0)


def test_the_text_says_that_the_number_of_users_was_declared(capsys):
    assert price.main(options(noise_multiplier=1.0)) == 0
    text = capsys.readouterr().out
    assert "epsilon           2.1245, at delta 1e-06, per user" in text
    assert "The number of users, 10,000, was declared" in text


def test_a_delta_that_would_allow_publishing_a_user_is_refused():
    with pytest.raises(ConfigError, match="publishing a user outright"):
        price.main(options(noise_multiplier=1.0, delta=1e-4))


def test_the_comparison_goes_with_the_price(capsys):
    small = options(noise_multiplier=2.0, group_size=2, num_steps=50)
    found = answer(["--compare", *small], capsys)
    assert found["comparison"]["els_tight"] <= found["comparison"]["els_textbook"]
    assert price.main(["--compare", *small]) == 0
    assert "The tight accountant saves" in capsys.readouterr().out


def test_counts_come_from_the_store_where_the_settings_give_none(tmp_path, capsys):
    counts = StoreCounts(
        num_users=3_000, num_examples=10_000, num_tokens=1, examples_per_user={1: 1_000, 5: 2_000}
    )
    PrivateCounts(train=counts).write(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{}")  # there is a store; a price reads no more of it
    settings = {
        "privacy": {"sampling": "els", "delta": 1e-6, "clip_norm": 1.0, "noise_multiplier": 2.0}
        | {"batch_size": 70, "group_size": 3, "num_steps": 10},
        "data": {"name": "chats", "store": str(tmp_path)},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    found = answer(["--config", str(file)], capsys)
    assert (found["population"], found["population_is_declared"]) == (3_000, False)
    assert found["num_examples"] == 1_000 + 3 * 2_000
    assert found["sampling_probability"] == 0.01


def test_memory_is_worked_out_without_weights(tmp_path, capsys):
    GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=500, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path)
    settings = ["--data.block_tokens", "64", "--model.name", str(tmp_path), "--memory"]
    found = answer([*options(noise_multiplier=1.0), *settings], capsys)["memory_bytes"]
    parts = sum(found[name] for name in ("weights", "clipped_sum", "optimizer", "noise_ahead"))
    assert found["total"] == parts + max(found["kernel"], found["update"])
    assert found["weights"] > 4 * 64 * 500
    assert price.main([*options(noise_multiplier=1.0), *settings]) == 0
    assert "at the peak" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"model\.name is missing"):
        price.main([*options(noise_multiplier=1.0), "--memory"])
    with pytest.raises(ConfigError, match=r"data\.block_tokens is missing"):
        price.main([*options(noise_multiplier=1.0), "--memory", "--model.name", str(tmp_path)])


# ---- what the price does not depend on is not asked for

ELS = {
    "sampling": "els",
    "delta": 1e-6,
    "batch_size": 64,
    "group_size": 3,
    "num_steps": 50,
    "num_examples": 10_000,
    "noise_multiplier": 1.5,
}


def of(settings):
    return [part for name, value in settings.items() for part in (f"--privacy.{name}", str(value))]


def test_the_price_is_the_same_for_every_clip_norm_and_without_one(capsys):
    without = {name: value for name, value in PRIVACY.items() if name != "clip_norm"}
    unknown = answer(of(without | {"epsilon": 2.0}), capsys)
    known = [answer(of(without | {"epsilon": 2.0, "clip_norm": c}), capsys) for c in (0.1, 7.0)]
    for found in known:
        assert found["epsilon"] == unknown["epsilon"]
        assert found["noise_multiplier"] == unknown["noise_multiplier"]
    assert (unknown["clip_norm"], unknown["noise_stddev"]) == (None, None)
    noise = unknown["noise_multiplier"]
    assert [found["noise_stddev"] for found in known] == pytest.approx([0.1 * noise, 7.0 * noise])


def test_without_a_clip_norm_no_stddev_is_made_up(capsys):
    without = {name: value for name, value in PRIVACY.items() if name != "clip_norm"}
    assert price.main(of(without | {"noise_multiplier": 1.25})) == 0
    text = capsys.readouterr().out
    assert "1.25 times the clip norm, which was not given" in text
    assert "(clip norm" not in text


def test_els_is_priced_without_a_population_and_delta_is_said_to_be_unchecked(capsys):
    unknown = answer(of(ELS), capsys)
    known = answer(of(ELS | {"population": 4_000}), capsys)
    assert unknown["epsilon"] == known["epsilon"]
    assert (unknown["population"], unknown["population_is_declared"]) == (None, None)
    assert (known["population"], known["population_is_declared"]) == (4_000, True)
    assert price.main(of(ELS)) == 0
    assert "delta was not compared with 1 / users" in capsys.readouterr().out
    assert price.main(of(ELS | {"population": 4_000})) == 0
    assert "not compared" not in capsys.readouterr().out


def test_delta_is_checked_where_the_number_of_users_is_known():
    with pytest.raises(ConfigError, match="publishing a user outright"):
        price.main(of(ELS | {"population": 4_000, "delta": 1e-3}))


@pytest.mark.parametrize(
    ("settings", "arguments", "missing"),
    [
        ({**ELS, "num_examples": "null"}, [], "privacy.num_examples"),
        ({**PRIVACY, "population": "null", "noise_multiplier": 1.0}, [], "privacy.population"),
        (ELS, ["--compare"], "privacy.population"),  # ULS at equal compute needs it
    ],
)
def test_what_the_price_depends_on_is_asked_for(settings, arguments, missing):
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        price.main([*of(settings), *arguments])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [({"clip_norm": None}, "privacy.clip_norm"), ({"population": None}, "privacy.population")],
)
def test_a_plan_that_trains_needs_both(changes, missing):
    # What training takes must not be had from a price's settings.
    settings = PricingConfig(**(ELS | {"population": 4_000, "clip_norm": 1.0} | changes))
    assert PricedPlan.from_config(settings, num_users=None).epsilon() > 0
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        PrivacyPlan.from_config(settings, num_users=None)


def test_settings_of_training_need_a_clip_norm():
    with pytest.raises(ValidationError, match="clip_norm"):
        PrivacyConfig(**(ELS | {"population": 4_000}))


BANDED = {"cohort_size": 40, "num_steps": 96, "population": 2_000, "epsilon": 2.0}


def test_bands_are_compared_when_they_are_used_and_when_they_are_asked_for(capsys):
    assert "bands_comparison" not in answer(options(**BANDED), capsys)
    asked = answer(["--bands", *options(**BANDED)], capsys)["bands_comparison"]
    banded = answer(options(**BANDED, mechanism="banded", bands=4), capsys)
    assert banded["bands_comparison"] == asked
    assert (banded["bands"], len(banded["strategy"])) == (4, 4)
    assert banded["sampling_probability"] == 4 * 40 / 2_000
    option = next(o for o in asked["options"] if o["bands"] == 4)
    assert option["noise_multiplier"] == pytest.approx(banded["noise_multiplier"], rel=1e-3)
    assert option["sum_noise"] < 0.85
    assert option["learning_rate_factor"] == option["step_noise"] > 2


def test_bands_are_compared_for_the_optimizer_and_schedule_in_use(capsys):
    plain = answer(["--bands", *options(**BANDED)], capsys)["bands_comparison"]
    given = ["--bands", "--train.optimizer", "sgd", "--train.schedule", "linear"]
    linear = answer([*given, *options(**BANDED)], capsys)["bands_comparison"]
    assert linear["options"][1]["sum_noise"] != plain["options"][1]["sum_noise"]
    assert {o["learning_rate_factor"] for o in linear["options"]} == {1.0}


def test_the_text_recommends_a_number_of_bands(capsys):
    assert price.main(options(**BANDED, mechanism="banded", bands=4)) == 0
    text = capsys.readouterr().out
    assert "4, each user in every 4th step at most" in text
    assert "Recommended: privacy.mechanism banded, privacy.bands 4" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": "els", "batch_size": 9, "num_examples": 99, "cohort_size": None},
            "needs privacy.sampling uls",
        ),
        (
            {"noise_multiplier": 0, "epsilon": None, "accept_no_guarantee": True},
            "no finite epsilon",
        ),
    ],
)
def test_bands_cannot_be_compared_without_users_or_a_promise(changes, message):
    with pytest.raises(ConfigError, match=message):
        price_of(PriceConfig(privacy=PRIVACY | BANDED | changes), bands=True)
