"""The black box audit: canary users with synthetic texts, scored on the released model.

    result = run_black_box(config, settings)
    print(result.to_text())

1. All canaries get ids and texts; a coin for each decides whether it is in.
2. `prepare` makes a store of the data's input and the rows of the canaries that are in.
3. A run with the given plan trains on it. The data's ledger charges it like any other run.
4. The score of each canary is the fall of its loss from the base model to the released one
   (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).
5. `reports.audit` writes what the scores say.

Everything lies in the output folder: canaries/ (open to its owner only), store/, run/ and the
report. A second call with the same settings and folder continues: canaries and a prepared store are
used again, the run resumes, and the scores are computed again.

Only the released model is scored. A run publishes nothing else: its other checkpoints are removed
when it ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from udp_ray.config.audit import AuditConfig, AuditJobConfig, without_audit
from udp_ray.config.experiment import DataConfig, ExperimentConfig
from udp_ray.console import progress
from udp_ray.data.remote import is_prepared, read_manifest
from udp_ray.data.store import TokenStore
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments.audit.canary_scores import CanaryExamples, score_canaries
from udp_ray.experiments.audit.canary_texts import (
    Canaries,
    TextWriter,
    make_canaries,
    new_coin_key,
)
from udp_ray.io import (
    ERROR_FILE,
    OWNER_ONLY,
    PRIVACY_FILE,
    RUN_FILE,
    OutputFolder,
    require_lasting,
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
CANARIES_FILE, AUDITED_FILE, ROWS_FILE = "canaries.json", "audited.json", "rows.parquet"


def run_black_box(
    config: ExperimentConfig,
    settings: AuditConfig,
    *,
    coin_key: bytes | None = None,
    announce: Callable[[str], None] = print,
) -> AuditResult:
    """Prepares, trains, scores and reports an audit in `config.output`, or continues it.

    Args:
        config: The run to audit: data, plan, model, kernel and stage. The store at `data.store` is
            not trained on, but the ledger that guards it is charged.
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
        config = require_possible(config)
        display.phase("writing canaries")
        canaries = prepare_canaries(config, settings, coin_key=coin_key)
        audited = audited_run(config, settings)
        announce(
            f"This run is made for an audit, with {settings.canary_users} synthetic users of whom"
            " about half train. It is charged to the budget of"
            f" {config.data.name!r} in {public_url(config.data.ledger_url)}."
        )
        with connected(config.cluster.address):
            if not is_prepared(audited.data.store):
                prepared = prepare(
                    audited.data,
                    tokenizer=config.tokenizer,
                    model=config.model.name,
                    never_held_out=canaries.ids,
                )
                announce(prepared.to_text())  # a new ledger knows of no earlier spending
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


def require_possible(config: ExperimentConfig) -> ExperimentConfig:
    """Checks folder, input and ledger, and returns the settings with the ledger that is charged.

    Raises:
        ConfigError: The output folder holds something else, or would vanish.
        UdpRayError: The input or the ledger cannot be used.
    """
    _require_folder(Path(config.output))
    data = config.data.model_copy(update={"ledger": _guarding_ledger(config.data)})
    require_usable(data, tokenizer=config.tokenizer, model=config.model.name)
    return config.model_copy(update={"data": data})


def _guarding_ledger(data: DataConfig) -> str:
    """Returns the URL of the ledger that the users' runs are charged to.

    A store names the ledger that it was prepared with, which need not lie beside it.
    """
    if not is_prepared(data.store):
        return data.ledger_url
    manifest = read_manifest(data.store)
    if manifest.name != data.name:
        raise ConfigError(
            f"data.name is {data.name}, but data.store {data.store} was prepared as"
            f" {manifest.name}: the name decides whose budget is spent, so correct one of them"
        )
    url = data.ledger or manifest.ledger_url
    Ledger.open(url, expected_id=manifest.ledger_id).close()
    return url


def audited_run(config: ExperimentConfig, settings: AuditConfig) -> AuditJobConfig:
    """Returns the settings of the run that an audit makes: other store, input and output.

    Its `audit` section is that of these settings, so that the run's statement and model are marked.
    """
    folder = Path(config.output)
    rows = folder / CANARIES_FOLDER / ROWS_FILE
    data = config.data.model_copy(
        update={
            "input": [*config.data.input, *([str(rows)] if rows.is_file() else [])],
            "store": str(folder / STORE_FOLDER),
            "ledger": config.data.ledger_url,  # that of the users, wherever the new store lies
        }
    )
    audit = settings.model_copy(update={"box": "black", "guesses": settings.num_guesses})
    values = {name: getattr(config, name) for name in ExperimentConfig.model_fields}
    values |= {"data": data, "output": str(folder / RUN_FOLDER), "audit": audit}
    return AuditJobConfig.model_construct(config.model_fields_set | set(values), **values)


# ---- canaries


def prepare_canaries(
    config: ExperimentConfig, settings: AuditConfig, *, coin_key: bytes | None = None
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
        _require_same_run(folder / AUDITED_FILE, config)
    else:
        writer = TextWriter.of(
            config.tokenizer, model=config.model.name, block_tokens=config.data.block_tokens
        )
        canaries = make_canaries(settings, writer, coin_key=coin_key or new_coin_key())
        with writing("the canaries", folder):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(OWNER_ONLY)
        write_atomic(folder / AUDITED_FILE, json.dumps(_what_is_audited(config)))
        write_atomic(file, canaries.to_json())
    rows = canaries.rows(config.data, only_in=True)
    # No rows: all coins say out. To refuse that would tell something of the coins of the others.
    if rows.num_rows and not (folder / ROWS_FILE).is_file():
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
    require_lasting(folder)
    if any(letter in str(folder) for letter in "*?["):
        raise ConfigError(
            f"output {folder} has one of * ? [ in it, which stand for several files where the"
            " canaries are read: give a folder without them"
        )
    require_writable_folder(folder, what="the audit")
    is_ours = (folder / CANARIES_FOLDER / CANARIES_FILE).is_file()
    found = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    if not is_ours and found - {CANARIES_FOLDER}:
        raise ConfigError(
            f"output {folder} is not empty and holds no audit to continue: give another folder"
        )


def _require_same(old: AuditConfig, new: AuditConfig, folder: Path) -> None:
    before, now = _chosen_beforehand(old), _chosen_beforehand(new)
    changed = [name for name in before if before[name] != now[name]]
    if changed:
        raise ConfigError(
            f"output {folder} holds an audit with audit.{changed[0]} ="
            f" {before[changed[0]]}, and not {now[changed[0]]}: settings are chosen before an"
            " audit, so give another folder, or continue with the same settings"
        )


def _chosen_beforehand(settings: AuditConfig) -> dict[str, Any]:
    values = settings.model_dump(exclude={"box", "accept_canaries"})
    return values | {"guesses": settings.num_guesses}


def _what_is_audited(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the settings that decide the run and the scores, which are chosen beforehand."""
    data = config.data.model_dump(mode="json", exclude={"store", "cache", "ledger"})
    return {
        "data": data,
        "model.name": config.model.name,
        "data.tokenizer": config.tokenizer,
        "privacy, model or train": without_audit(config).digest(),
    }


def _require_same_run(file: Path, config: ExperimentConfig) -> None:
    """Refuses to go on with another run, or to score with another base model.

    Raises:
        ConfigError: The settings of the run have changed.
    """
    before = json.loads(file.read_text()) if file.is_file() else {}
    now = json.loads(json.dumps(_what_is_audited(config)))
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"output {config.output} holds an audit with other settings of {name}, which are"
                " chosen before an audit: give those, or another folder"
            )


# ---- the run


def _trained(audited: ExperimentConfig, announce: Callable[[str], None]) -> PrivacyStatement:
    """Trains, resumes, or finds the run ended; returns what was promised and spent."""
    folder = OutputFolder(Path(audited.output))
    has_begun = (folder.path / RUN_FILE).is_file()
    if not (has_begun and _has_ended(audited.data, folder.run_id())):
        return train(audited, resume=has_begun, announce=announce).statement
    if (folder.path / ERROR_FILE).is_file():
        raise ConfigError(
            f"the audited run in {folder.path} diverged: audit in another output folder, with a"
            " lower train.learning_rate or privacy.clip_norm"
        )
    statement = load_statement(folder.path / PRIVACY_FILE)
    if not isinstance(statement, PrivacyStatement):
        raise DataError(f"{folder.path} holds a sweep: give another output folder")
    return statement


def _has_ended(data: DataConfig, run_id: str) -> bool:
    with Ledger.open(data.ledger_url) as ledger:
        return ledger.run(run_id).state == "finished"


def _description(
    audited: ExperimentConfig, settings: AuditConfig, statement: PrivacyStatement
) -> dict[str, Public]:
    plan = statement.plan
    found: dict[str, Public] = {
        "canary text": settings.canary_text,
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
