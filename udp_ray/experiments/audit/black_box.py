"""The black box audit: canary users with synthetic texts, scored on the released model.

    result = run_black_box(config, settings)
    print(result.to_text())

1. All canaries get ids and texts; a coin for each decides whether it is in.
2. `prepare` makes a store of the data's input and the rows of the canaries that are in.
3. A run with the given plan trains on it. The data's ledger charges it like any other run.
4. The score of each canary is the fall of its loss from the base model to the released one
   (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, section 6).
5. `reports.audit` writes what the scores say.

Everything lies in the output folder: canaries/ (open to its owner only), store/, run/ and the
report. A second call with the same settings and folder continues: canaries and a prepared store are
used again, the run resumes, and the scores are computed again.

Only the released model is scored. A run publishes nothing else: its other checkpoints are removed
when it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from udp_ray.config.experiment import DataConfig, ExperimentConfig
from udp_ray.console import progress
from udp_ray.data.remote import is_prepared
from udp_ray.data.store import TokenStore
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments.audit.canary_scores import CanaryExamples, score_canaries
from udp_ray.experiments.audit.canary_texts import (
    BlackBoxSettings,
    Canaries,
    TextWriter,
    make_canaries,
    new_coin_key,
)
from udp_ray.io import (
    OWNER_ONLY,
    PRIVACY_FILE,
    RUN_FILE,
    OutputFolder,
    require_writable_folder,
    write_atomic,
    writing,
)
from udp_ray.ledger.database import public_url
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.cluster import connected
from udp_ray.on_ray.prepare import prepare, require_usable
from udp_ray.on_ray.train import train
from udp_ray.reports.audit import AuditResult, Public, write_audit
from udp_ray.reports.statement import PrivacyStatement, load_statement
from udp_ray.runs.registration import registered

CANARIES_FOLDER, STORE_FOLDER, RUN_FOLDER = "canaries", "store", "run"
CANARIES_FILE, ROWS_FILE = "canaries.json", "rows.parquet"


def run_black_box(
    config: ExperimentConfig,
    settings: BlackBoxSettings,
    *,
    coin_key: bytes | None = None,
    announce: Callable[[str], None] = print,
) -> AuditResult:
    """Prepares, trains, scores and reports an audit in `config.output`, or continues it.

    Args:
        config: The run to audit: data, plan, model, kernel and stage. `data.store` is not used; its
            ledger is, so that the users' budget is charged.
        settings: Of the audit.
        coin_key: Decides who is in. Default: a new random one.
        announce: Shows a text.

    Raises:
        ConfigError: The output folder holds something else, or settings cannot be used.
        UdpRayError: What a user can fix, in a sentence or two. The audit can be continued.
    """
    folder = Path(config.output)
    with progress("checking the input") as display:
        announce = display.announcing(announce)
        _require_folder(folder)
        require_usable(config.data, tokenizer=config.tokenizer, model=config.model.name)
        display.phase("writing canaries")
        canaries = prepare_canaries(config, settings, coin_key=coin_key)
        audited = audited_run(config)
        announce(
            f"This run is made for an audit, with {settings.num_canaries} synthetic users of whom"
            " about half train. It is charged to the budget of"
            f" {config.data.name!r} in {public_url(config.data.ledger_url)}."
        )
        with connected(config.cluster.address):
            if not is_prepared(audited.data.store):
                prepare(
                    audited.data,
                    tokenizer=config.tokenizer,
                    model=config.model.name,
                    never_held_out=canaries.ids,
                )
            display.phase("checking the canaries in the store")
            examples = stored_examples(audited, canaries)
            statement = _trained(audited, announce)
        scores = score_canaries(examples, base=config.model.name, trained=Path(audited.output))
        display.phase("reporting")
        result = AuditResult(
            kind="black box",
            scores=scores,
            is_in=canaries.coins,
            num_guesses=settings.num_guesses,
            promised_epsilon=statement.promised.epsilon,
            spent_epsilon=statement.spent.epsilon if statement.spent else 0.0,
            delta=statement.promised.delta,
            confidence=settings.confidence,
            description=_description(audited, settings, statement),
        )
        write_audit(folder, result)
    return result


def audited_run(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the settings of the run that an audit makes: other store, input and output."""
    folder = Path(config.output)
    rows = str(folder / CANARIES_FOLDER / ROWS_FILE)
    data = config.data.model_copy(
        update={
            "input": [*config.data.input, rows],
            "store": str(folder / STORE_FOLDER),
            "ledger": config.data.ledger_url,  # that of the users, wherever the new store lies
        }
    )
    return config.model_copy(update={"data": data, "output": str(folder / RUN_FOLDER)})


# ---- canaries


def prepare_canaries(
    config: ExperimentConfig, settings: BlackBoxSettings, *, coin_key: bytes | None = None
) -> Canaries:
    """Writes the canaries of an audit, and the rows of those that are in; or returns those written.

    Args:
        config: Names the folder, the columns, the tokenizer and the base model.
        settings: Of the audit.
        coin_key: Decides who is in. Default: a new random one.

    Raises:
        ConfigError: The folder holds the canaries of other settings.
        StorageError: The folder cannot be written.
    """
    folder = Path(config.output) / CANARIES_FOLDER
    file = folder / CANARIES_FILE
    if file.is_file():
        canaries = Canaries.from_json(file.read_text(), source=str(file))
        _require_same(canaries.settings, settings, Path(config.output))
    else:
        writer = TextWriter.of(
            config.tokenizer, model=config.model.name, block_tokens=config.data.block_tokens
        )
        canaries = make_canaries(settings, writer, coin_key=coin_key or new_coin_key())
        with writing("the canaries", folder):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(OWNER_ONLY)
        write_atomic(file, canaries.to_json())
    rows = canaries.rows(config.data, only_in=True)
    if not rows.num_rows:
        raise ConfigError(
            f"none of {settings.num_canaries} canaries is in, by chance: give a larger"
            " audit.canary_users, and another output folder"
        )
    if not (folder / ROWS_FILE).is_file():
        with writing(ROWS_FILE, folder):
            temporary = folder / f".{ROWS_FILE}"
            pq.write_table(rows, temporary)
            temporary.rename(folder / ROWS_FILE)
    return canaries


def stored_examples(audited: ExperimentConfig, canaries: Canaries) -> CanaryExamples:
    """Returns the canaries' examples, after comparing them with the prepared store.

    Raises:
        DataError: A canary's id is that of a user too, or the store has other canaries.
    """
    writer = TextWriter.of(
        audited.tokenizer, model=audited.model.name, block_tokens=audited.data.block_tokens
    )
    with registered(audited.data.name, audited.data.ledger_url) as registration:
        key = registration.user_hash_key
    examples = CanaryExamples.of(canaries, audited.data, writer.encoder, key)
    examples.require_stored(TokenStore.open(audited.data.store, verify=False))
    return examples


# ---- the folder


def _require_folder(folder: Path) -> None:
    require_writable_folder(folder, what="the audit")
    is_ours = (folder / CANARIES_FOLDER / CANARIES_FILE).is_file()
    others = (
        [each for each in folder.iterdir() if each.name != CANARIES_FOLDER]
        if (folder.is_dir())
        else []
    )
    if not is_ours and others:
        raise ConfigError(
            f"output {folder} is not empty and holds no audit to continue: give another folder"
        )


def _require_same(old: BlackBoxSettings, new: BlackBoxSettings, folder: Path) -> None:
    before, now = asdict(old), asdict(new)
    changed = [name for name in before if before[name] != now[name]]
    if changed:
        raise ConfigError(
            f"output {folder} holds an audit with {changed[0]} = {before[changed[0]]}, and not"
            f" {now[changed[0]]}: settings are chosen before an audit, so give another folder, or"
            " continue with the same settings"
        )


# ---- the run


def _trained(audited: ExperimentConfig, announce: Callable[[str], None]) -> PrivacyStatement:
    """Trains, resumes, or finds the run ended; returns what was promised and spent."""
    folder = OutputFolder(Path(audited.output))
    has_begun = (folder.path / RUN_FILE).is_file()
    if not (has_begun and _has_ended(audited.data, folder.run_id())):
        return train(audited, resume=has_begun, announce=announce).statement
    statement = load_statement(folder.path / PRIVACY_FILE)
    if not isinstance(statement, PrivacyStatement):
        raise DataError(f"{folder.path} holds a sweep: give another output folder")
    return statement


def _has_ended(data: DataConfig, run_id: str) -> bool:
    with Ledger.open(data.ledger_url) as ledger:
        return ledger.run(run_id).state == "finished"


def _description(
    audited: ExperimentConfig, settings: BlackBoxSettings, statement: PrivacyStatement
) -> dict[str, Public]:
    plan = statement.plan
    found: dict[str, Public] = {
        "canary text": settings.text,
        "texts per canary": settings.texts_per_canary,
        "tokens per text": settings.text_tokens,
        "score": "fall of the mean loss per token, base model to released model",
        "base model": audited.model.name,
        "sampling": plan.sampling,
        "steps": plan.num_steps,
        "expected size": plan.expected_size,
        "noise multiplier": float(np.round(plan.noise_multiplier, 6)),
        "clip norm": plan.clip_norm,
    }
    if statement.run is not None:
        found["run"] = statement.run.run_id
    return found
