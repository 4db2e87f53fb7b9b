"""The black box audit: who is in, what is stored and scored, and what its bound finds.

pytest tests/experiments/test_black_box.py
pytest tests/experiments/test_black_box.py -m slow      # the whole audit on Ray
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.runs import DATASET, text_of_people, tiny_experiment
from tests.support.statistics import agrees_with_binomial
from tests.support.training import VOCABULARY, RecordingAccountant
from udp_ray.config.audit import AuditConfig, audit_of
from udp_ray.config.experiment import DataConfig, ExperimentConfig, LoraConfig, TrainConfig
from udp_ray.data.build import (
    BuildSettings,
    Origin,
    StageResults,
    finish,
    tokenize_batch,
    write_shards,
)
from udp_ray.data.hashing import hash_user
from udp_ray.data.read import Columns
from udp_ray.data.store import TokenStore
from udp_ray.data.tokenize import Placement
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.distributed import join_world
from udp_ray.engine.language_model import train as train_in_process
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments.audit.black_box import (
    audited_run,
    prepare_canaries,
    require_possible,
    run_black_box,
)
from udp_ray.experiments.audit.canary_scores import CanaryExamples, score_canaries
from udp_ray.experiments.audit.canary_texts import (
    Canaries,
    TextWriter,
    coin,
    make_canaries,
)
from udp_ray.ledger.ledger import Ledger
from udp_ray.models.load import trainable_parameters
from udp_ray.models.lora import add_adapters
from udp_ray.reports.audit import AuditResult, load_audit
from udp_ray.reports.statement import AuditMark

KEY = bytes(range(32))
COIN_KEY = b"sixteen bytes of"
SETTINGS = AuditConfig(box="black", canary_users=40, seed=3, guesses=10, text_tokens=12)
NUM_COINS = 20_000
SAME_LOSS = 1e-5
"""Of means of float32 losses, computed in passes of other shapes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that can learn a few dozen texts, and its tokenizer of whole words."""
    place = tmp_path_factory.mktemp("black_box")
    tiny_experiment(place)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(place / "model")
    return place


def data_of(folder: Path, **changes: Any) -> DataConfig:
    values = text_of_people(folder) | {
        "name": DATASET, "store": str(folder / "new"), "block_tokens": 32,
        "tokenizer": str(folder / "model"), "heldout": None,
    }  # fmt: skip
    return DataConfig.model_validate(values | changes)


def writer_of(folder: Path) -> TextWriter:
    model = str(folder / "model")
    return TextWriter.of(model, model=model, block_tokens=32)


def changed(**changes: Any) -> AuditConfig:
    return SETTINGS.model_copy(update=changes)


def canaries_of(folder: Path, **changes: Any) -> Canaries:
    return make_canaries(changed(**changes), writer_of(folder), coin_key=COIN_KEY)


def rows_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "rows.parquet", columns=["who", "text"])


def build(
    place: Path, folder: Path, rows: pa.Table, *, share: float = 0.0, never: tuple[str, ...] = ()
) -> TokenStore:
    """Makes a store of rows by the stages of `prepare`, in this process."""
    place.mkdir()
    hashes = frozenset(hash_user(KEY, name) for name in never)
    settings = BuildSettings(
        columns=Columns("who", "text"),
        encoder=writer_of(folder).encoder,
        placement=Placement(KEY, 3, share, hashes),
        max_examples_per_user=None,
        folder=place,
        pack=True,
    )
    block = pa.concat_tables(tokenize_batch(rows, settings))
    results = StageResults.of(write_shards(block, settings).to_pylist())
    finish(settings, results, Origin(DATASET, "ledger", "sqlite:////l", {"input": "rows"}, {}))
    return TokenStore.open(place, verify=True)


def examples_of(store: TokenStore | None) -> dict[bytes, list[tuple[int, bytes]]]:
    """Each user's examples, byte by byte."""
    if store is None:
        return {}
    bounds = itertools.pairwise(store.user_offsets.tolist())
    return {
        store.user_hash(user): [
            (store.loss_start(n), store.tokens(n).tobytes()) for n in range(first, last)
        ]
        for user, (first, last) in enumerate(bounds)
    }


# ---- ids, texts and coins


@pytest.mark.parametrize("text", ["random", "sampled"])
def test_ids_and_texts_are_a_function_of_the_seed_alone(folder: Path, text: Any) -> None:
    one = canaries_of(folder, canary_text=text)
    again = make_canaries(one.settings, writer_of(folder), coin_key=b"another key")
    other = canaries_of(folder, canary_text=text, seed=4)
    assert (one.ids, one.texts) == (again.ids, again.texts)
    assert one.is_in != again.is_in
    assert not set(one.ids) & set(other.ids)
    assert not set(one.texts) & set(other.texts)
    assert len(set(one.ids)) == len(set(one.texts)) == SETTINGS.canary_users
    assert Canaries.from_json(one.to_json(), source="here") == one


def test_coins_are_fair_and_independent_of_ids_places_and_other_keys() -> None:
    ids = [f"canary {number}" for number in range(NUM_COINS)]
    coins = np.array([coin(COIN_KEY, each) for each in ids])
    others = np.array([coin(b"another key", each) for each in ids])
    counts = [
        coins.sum(), (coins == others).sum(), (coins == (np.arange(NUM_COINS) % 2)).sum(),
        (coins[1:] == coins[:-1]).sum() + 0.5, (coins[::2] == coins[1::2]).sum() * 2,
    ]  # fmt: skip
    assert agrees_with_binomial(counts[:3], trials=NUM_COINS, probability=0.5)
    assert agrees_with_binomial(int(counts[3]), trials=NUM_COINS - 1, probability=0.5)
    assert agrees_with_binomial(counts[4] // 2, trials=NUM_COINS // 2, probability=0.5)
    # The failing arm: a coin of chance 17/32 is told from a fair one.
    unfair = coins | (np.arange(NUM_COINS) % 16 == 0)
    assert not agrees_with_binomial(unfair.sum(), trials=NUM_COINS, probability=0.5)


def test_only_canaries_that_are_in_get_rows(folder: Path) -> None:
    canaries = canaries_of(folder, texts_per_canary=2)
    data = data_of(folder, prompt_column="asked", response_column="said")
    rows = canaries.rows(data, only_in=True)
    assert set(rows["who"].to_pylist()) == set(np.array(canaries.ids)[canaries.coins].tolist())
    assert set(rows["asked"].to_pylist()) == {""}
    assert canaries.rows(data, only_in=False).num_rows == 2 * len(canaries.ids)
    ordered = canaries.rows(data_of(folder, order_column="at"), only_in=True)
    assert ordered["at"].to_pylist() == [0, 1] * sum(canaries.is_in)


# ---- the store


def test_real_users_keep_their_examples_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    canaries, rows = canaries_of(folder, texts_per_canary=3), rows_of(folder)
    added = canaries.rows(data_of(folder), only_in=True)
    plain = build(tmp_path / "plain", folder, rows, share=0.3)
    audited = build(
        tmp_path / "audited", folder, pa.concat_tables([added, rows]), share=0.3, never=canaries.ids
    )
    assert plain.heldout is not None
    assert examples_of(audited.heldout) == examples_of(plain.heldout)
    found, expected = examples_of(audited), examples_of(plain)
    assert {user: found[user] for user in expected} == expected
    hashes = {hash_user(KEY, name) for name in np.array(canaries.ids)[canaries.coins]}
    assert found.keys() - expected.keys() == hashes


def test_a_share_of_held_out_users_takes_no_canary(folder: Path, tmp_path: Path) -> None:
    canaries = canaries_of(folder)
    data, encoder = data_of(folder), writer_of(folder).encoder
    examples = CanaryExamples.of(canaries, data, encoder, KEY)
    rows = pa.concat_tables([canaries.rows(data, only_in=True), rows_of(folder)])
    examples.require_stored(build(tmp_path / "a", folder, rows, share=0.5, never=canaries.ids))
    taken = build(tmp_path / "b", folder, rows, share=0.5)  # the failing arm
    with pytest.raises(DataError, match="occurs in the input or its held-out part"):
        examples.require_stored(taken)


@pytest.mark.parametrize("which", ["in", "out"])
def test_an_id_of_a_canary_that_is_also_a_users_is_found(
    folder: Path, tmp_path: Path, which: str
) -> None:
    canaries = canaries_of(folder)
    data = data_of(folder)
    examples = CanaryExamples.of(canaries, data, writer_of(folder).encoder, KEY)
    name = canaries.ids[canaries.is_in.index(which == "in")]
    users = pa.table({"who": [name], "text": ["w1 w2"]})
    rows = pa.concat_tables([canaries.rows(data, only_in=True), rows_of(folder), users])
    with pytest.raises(DataError, match=f"{name}, the id of a canary, occurs in the input"):
        examples.require_stored(build(tmp_path / "store", folder, rows))


# ---- scores


def plain_loss(model: GPT2LMHeadModel, tokens: list[int]) -> float:
    """The mean loss of all tokens but the first, one row alone, in float64 after the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    chances = logits.log_softmax(dim=1)
    return -float(chances[range(len(tokens) - 1), tokens[1:]].mean())


def expected_loss(
    folder: Path, model: GPT2LMHeadModel, texts: tuple[str, ...], found: float
) -> float:
    """The loss of one canary's joined texts; of the orders that are possible, the nearest."""
    numbers = [[int(word[1:]) for word in text.split()] + [0] for text in texts]
    losses = [
        plain_loss(model, list(itertools.chain(*order)))
        for order in itertools.permutations(numbers)
    ]
    return min(losses, key=lambda each: abs(each - found))


@pytest.mark.parametrize(
    ("number", "changes"),
    [(1, {}), (2, {}), (1, {"prompt_column": "asked", "response_column": "text"})],
)
def test_losses_are_those_of_a_plain_loop(
    folder: Path, number: int, changes: dict[str, str]
) -> None:
    canaries = canaries_of(folder, texts_per_canary=number)
    data = data_of(folder, **changes)
    examples = CanaryExamples.of(canaries, data, writer_of(folder).encoder, KEY)
    model = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    losses = examples.losses(model)
    expected = [
        expected_loss(folder, model, texts, found)
        for texts, found in zip(canaries.texts, losses, strict=True)
    ]
    assert np.abs(losses - expected).max() < SAME_LOSS
    # The failing arm: losses in the order of the store are those of other canaries.
    assert np.abs(losses[examples.numbers] - expected).max() > 100 * SAME_LOSS


def test_adapters_are_scored_on_top_of_their_base_model(folder: Path, tmp_path: Path) -> None:
    examples = CanaryExamples.of(
        canaries_of(folder), data_of(folder), writer_of(folder).encoder, KEY
    )
    base = GPT2LMHeadModel.from_pretrained(folder / "model")
    before = examples.losses(base)
    add_adapters(base, LoraConfig(rank=2), dropout=0.0)
    with torch.no_grad():
        for weight in trainable_parameters(base).values():
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    base.save_pretrained(tmp_path)
    scores = score_canaries(examples, base=str(folder / "model"), trained=tmp_path)
    assert np.abs(scores).max() > 100 * SAME_LOSS
    assert np.abs(scores - (before - examples.losses(base))).max() < SAME_LOSS


# ---- what the bound finds

PLAN = PrivacyPlan(
    sampling="uls", noise_multiplier=10.0, clip_norm=1.0, group_size=2, num_steps=60,
    expected_size=30, population=60, population_is_declared=True, delta=1e-3,
)  # fmt: skip
AUDIT = AuditConfig(box="black", canary_users=80, seed=1, guesses=30, text_tokens=16)


def audit_in_process(folder: Path, place: Path, trained_with: PrivacyPlan) -> AuditResult:
    """Audits the promise of `PLAN` on a model that was trained under another plan."""
    place.mkdir()
    canaries = make_canaries(AUDIT, writer_of(folder), coin_key=COIN_KEY)
    data = data_of(folder)
    rows = pa.concat_tables([canaries.rows(data, only_in=True), rows_of(folder)])
    store = build(place / "store", folder, rows)
    examples = CanaryExamples.of(canaries, data, writer_of(folder).encoder, KEY)
    examples.require_stored(store)
    model = GPT2LMHeadModel.from_pretrained(folder / "model")
    join_world()
    train_in_process(
        model,
        store,
        trained_with,
        settings=TrainConfig(
            learning_rate=1e-2, checkpoint_every=trained_with.num_steps, kernel="ghost"
        ),
        autocast="off",
        keys=RunKey.from_seed(5).of_rank(0),
        accountant=RecordingAccountant([]),
        publish=lambda step, checkpoint: str(checkpoint),
        on_metrics=None,
        workspace=place / "workspace",
    )
    model.save_pretrained(place / "trained")
    return AuditResult(
        kind="black box",
        scores=score_canaries(examples, base=str(folder / "model"), trained=place / "trained"),
        is_in=canaries.coins,
        num_guesses=AUDIT.num_guesses,
        promised_epsilon=PLAN.epsilon(),
        spent_epsilon=PLAN.epsilon(),
        delta=PLAN.delta,
        confidence=AUDIT.confidence,
        description={},
    )


def test_the_bound_is_below_the_promise_of_a_sound_run_and_finds_a_hundredth_of_the_noise(
    folder: Path, tmp_path: Path
) -> None:
    """False alarm of the first arm: at most 5% over the choice of seeds, by the bound itself."""
    sound = audit_in_process(folder, tmp_path / "sound", PLAN)
    assert 0.5 < sound.promised_epsilon < 1.5 < sound.ceiling
    assert not sound.exceeds_promise
    broken = audit_in_process(folder, tmp_path / "broken", replace(PLAN, noise_multiplier=0.1))
    assert broken.exceeds_promise, broken.to_text()


# ---- the whole audit


def experiment(folder: Path, **data: Any) -> ExperimentConfig:
    values = text_of_people(folder) | data
    return tiny_experiment(folder, data=values, privacy={"num_steps": 2})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_an_audit_that_was_stopped_continues_and_is_charged_once(tmp_path: Path) -> None:
    config = experiment(tmp_path, heldout=0.5)
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if "admitted" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_black_box(config, SETTINGS, announce=stop)
    folder = Path(config.output)
    canaries = (folder / "canaries" / "canaries.json").read_text()
    manifest = (folder / "store" / "manifest.json").read_bytes()
    resumed = run_black_box(config, SETTINGS, announce=told.append)
    again = run_black_box(config, SETTINGS, announce=told.append)  # scores an ended run
    assert (folder / "canaries" / "canaries.json").read_text() == canaries
    assert (folder / "store" / "manifest.json").read_bytes() == manifest
    assert np.array_equal(resumed.scores, again.scores)
    assert resumed.to_dict() == load_audit(folder / "audit.json").to_dict()
    assert any("made for an audit, with 40 synthetic users" in text for text in told)
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        (run,) = ledger.spent(DATASET).runs
    assert run.charge.epsilon == resumed.promised_epsilon == resumed.spent_epsilon
    assert run.run_id == resumed.description["run"]
    assert resumed.is_in.tolist() == json.loads(canaries)["is_in"]
    assert (folder / "canaries").stat().st_mode & 0o077 == 0


# ---- refusals


def test_a_tokenizer_with_too_few_rare_words_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"canary_text is rare, but the tokenizer .* only 0"):
        canaries_of(folder, canary_text="rare")


def test_input_without_the_text_column_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = experiment(tmp_path, text_column="words")
    with pytest.raises(DataError, match="has no column 'words'"):
        run_black_box(config, SETTINGS, announce=print)
    assert not Path(config.output).exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    Path(config.output).mkdir()
    (Path(config.output) / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no audit to continue"):
        run_black_box(config, SETTINGS, announce=print)


def test_an_audit_is_continued_with_its_own_settings_only(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    first = prepare_canaries(config, SETTINGS)
    assert prepare_canaries(config, SETTINGS, coin_key=COIN_KEY) == first
    with pytest.raises(ConfigError, match=r"holds an audit with audit\.guesses = 10, and not 12"):
        prepare_canaries(config, changed(guesses=12))
    (Path(config.output) / "canaries" / "canaries.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        prepare_canaries(config, SETTINGS)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("train", {"learning_rate": 0.3}, "privacy, model or train"),
        ("privacy", {"clip_norm": 0.3}, "privacy, model or train"),
        ("data", {"max_examples_per_user": 3}, "settings of data,"),
        ("model", {"name": "another"}, "settings of model.name,"),
    ],
)
def test_an_audit_is_continued_with_the_same_run_only(
    tmp_path: Path, section: str, changes: dict[str, Any], words: str
) -> None:
    config = experiment(tmp_path)
    tokenizer = {"tokenizer": config.tokenizer}  # it stays where the model changes
    base = config.model_copy(update={"data": config.data.model_copy(update=tokenizer)})
    prepare_canaries(base, SETTINGS)
    other = getattr(base, section).model_copy(update=changes)
    with pytest.raises(ConfigError, match=re.escape(words)):
        prepare_canaries(base.model_copy(update={section: other}), SETTINGS)


def test_the_ledger_that_guards_the_store_is_charged(tmp_path: Path) -> None:
    """Not a new one beside the store, which would know of nothing that was spent."""
    (tmp_path / "secure").mkdir()
    elsewhere = f"sqlite:///{tmp_path / 'secure' / 'ledger.sqlite'}"
    data = text_of_people(tmp_path)
    config = tiny_experiment(tmp_path, ledger_url=elsewhere, data=data, privacy={"num_steps": 2})
    assert config.data.ledger is None  # as in the config.yaml of a run
    possible = require_possible(config)
    assert possible.data.ledger == elsewhere
    assert audited_run(possible, SETTINGS).data.ledger == elsewhere
    other = config.data.model_copy(update={"name": "others"})
    with pytest.raises(ConfigError, match=r"data\.name is others, but data\.store"):
        require_possible(config.model_copy(update={"data": other}))


def test_the_run_of_an_audit_is_marked(tmp_path: Path) -> None:
    audited = audited_run(experiment(tmp_path), SETTINGS)
    mark = AuditMark.of(audit_of(audited))
    assert mark is not None
    assert (mark.num_canaries, mark.box) == (40, "black")
    assert mark.warning() is not None


@pytest.mark.parametrize("name", ["audit[1]", "audits*", "audit?"])
def test_a_folder_that_reads_as_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    config = experiment(tmp_path).model_copy(update={"output": str(tmp_path / name)})
    with pytest.raises(ConfigError, match="give a folder without them"):
        run_black_box(config, SETTINGS, announce=print)


def test_sampled_texts_fit_the_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit\.text_tokens is 4096, and the \d+ positions"):
        canaries_of(folder, canary_text="sampled", text_tokens=4096)


def test_an_audit_in_which_no_canary_is_in_goes_on(tmp_path: Path) -> None:
    one = changed(canary_users=1, guesses=1)
    for number in range(64):
        config = experiment(tmp_path).model_copy(update={"output": str(tmp_path / f"{number}")})
        key = number.to_bytes(16, "big")
        if not any(make_canaries(one, writer_of(tmp_path), coin_key=key).is_in):
            prepare_canaries(config, one, coin_key=key)
            assert audited_run(config, one).data.input == config.data.input
            return
    pytest.fail("64 coins alike")
