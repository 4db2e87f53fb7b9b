"""Which errors of a worker stop the run for good, and that public types hold no key.

pytest tests/on_ray/test_worker.py
"""

from __future__ import annotations

import dataclasses
import typing
from types import SimpleNamespace

import pytest
import ray

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.keys import RankKeys, RunKey, StreamKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import ConfigError, LedgerError, RankFailedError, UdpRayError
from udp_ray.ledger import Attempt, RunRecord
from udp_ray.on_ray import worker
from udp_ray.on_ray.accountant import AccountantConfig, Progress, RemoteAccountant


def stops_of(
    monkeypatch: pytest.MonkeyPatch, error: Exception, *, rank: int
) -> list[UdpRayError | Exception]:
    """Runs a worker that fails with an error; returns what it stopped the run with."""
    stops: list[UdpRayError | Exception] = []

    def fail(*_: object) -> None:
        raise error

    context = SimpleNamespace(get_world_rank=lambda: rank)
    job = SimpleNamespace(
        accountant=None,
        run_folder="",
        config=SimpleNamespace(cluster=SimpleNamespace(cpus_per_worker=1)),
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(worker, "_begin", fail)
    monkeypatch.setattr(RemoteAccountant, "stop", lambda _, found: stops.append(found))
    with pytest.raises(type(error)):
        worker.run_worker({"job": job})
    return stops


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [ConfigError("a mistake"), LedgerError("refused")])
def test_a_users_error_stops_the_run_whichever_rank_finds_it(
    monkeypatch: pytest.MonkeyPatch, error: UdpRayError, rank: int
) -> None:
    assert stops_of(monkeypatch, error, rank=rank) == [error]


def test_a_rank_that_hears_of_rank_0s_failure_leaves_the_run_to_be_restarted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert stops_of(monkeypatch, RankFailedError("rank 0 failed"), rank=1) == []
    assert stops_of(monkeypatch, RuntimeError("a bug"), rank=0) == []


def test_as_a_ledger_error_the_same_failure_would_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The failing arm: such a failure as a user's error."""
    assert len(stops_of(monkeypatch, LedgerError("rank 0 failed"), rank=1)) == 1


# ---- what is broadcast, shown or written by Ray holds no key

SECRET = (RunKey, StreamKey, RankKeys)
PUBLIC = (
    Attempt, RunRecord, Progress, AccountantConfig, worker.WorkerJob, ExperimentConfig, PrivacyPlan,
)  # fmt: skip


def types_within(kind: type, seen: set[type] | None = None) -> set[type]:
    """Returns the types of all fields of a dataclass or settings class, at any depth."""
    seen = set() if seen is None else seen
    if kind in seen:
        return seen
    seen.add(kind)
    is_record = dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields")
    for hint in typing.get_type_hints(kind).values() if is_record else ():
        for part in parts_of(hint):
            types_within(part, seen)
    return seen


def parts_of(hint: object) -> list[type]:
    """Returns the classes that a type hint is made of."""
    parts = [part for inner in typing.get_args(hint) for part in parts_of(inner)]
    return [*parts, hint] if isinstance(hint, type) else parts


@pytest.mark.parametrize("kind", PUBLIC)
def test_a_public_type_has_no_field_for_a_key(kind: type) -> None:
    assert not types_within(kind) & set(SECRET)


def test_the_reader_of_types_finds_a_key_behind_others() -> None:
    """The failing arm."""
    Box = dataclasses.make_dataclass("Box", [("keys", dict[str, RankKeys | None])])
    Outer = dataclasses.make_dataclass("Outer", [("boxes", tuple[Box, ...])])
    assert types_within(Outer) >= {RankKeys, StreamKey}
