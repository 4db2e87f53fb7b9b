"""How a failure of rank 0 reaches the other ranks.

pytest tests/engine/test_distributed.py
"""

import pytest

from tests.support.distributed import WorldFailed, raise_on_rank_0, run_on_ranks
from udp_ray.errors import (
    ConfigError,
    LedgerError,
    PrivacyBudgetExceededError,
    RankFailedError,
    UdpRayError,
)


def failures(error: Exception) -> dict[int, BaseException]:
    with pytest.raises(WorldFailed) as failure:
        run_on_ranks(2, raise_on_rank_0, error)
    return failure.value.errors


@pytest.mark.parametrize("error", [PrivacyBudgetExceededError("no"), ConfigError("a mistake")])
def test_a_users_error_of_rank_0_reaches_each_rank_as_itself(error: Exception) -> None:
    found = failures(error)
    assert {rank: type(raised) for rank, raised in found.items()} == dict.fromkeys(
        (0, 1), type(error)
    )
    assert {str(raised) for raised in found.values()} == {str(error)}


def test_any_other_error_of_rank_0_is_a_rank_failed_error_elsewhere() -> None:
    found = failures(KeyError("weights of a user"))
    assert {rank: type(raised) for rank, raised in found.items()} == {
        0: KeyError, 1: RankFailedError,
    }  # fmt: skip
    assert "KeyError" in str(found[1])
    assert "user" not in str(found[1])  # its text may be private


def test_a_failure_of_rank_0_is_neither_a_users_error_nor_a_refusal_of_the_ledger() -> None:
    assert not issubclass(RankFailedError, UdpRayError)
    assert issubclass(LedgerError, UdpRayError)  # the failing arm: what such a failure used to be
