"""The few errors that a caller may catch.

Every error here is the user's to mend: its text is one or two sentences that name the field, the
value and the remedy. Jobs print the text and exit with status 2, without a traceback. The one
exception is `GuaranteeError`, which is a defect of ours and shows its traceback.

Errors travel between processes as pickles, so each one rebuilds from its single message.
"""


class UdpRayError(Exception):
    """Base of all errors that a user can mend."""


class GuaranteeError(RuntimeError):
    """An invariant that the privacy guarantee rests on does not hold: a defect, not a user's error.

    Raised instead of `assert`, which `python -O` removes. It is not a `UdpRayError`, so jobs end
    with its traceback and nobody is told a remedy; what was charged stays charged.
    """


class RankFailedError(RuntimeError):
    """Rank 0 failed with an exception that is no user's error; raised on the other ranks.

    It is not a `UdpRayError`: no user can fix it, and workers that fail with it may be restarted.
    """


class ConfigError(UdpRayError, ValueError):
    """A setting is missing, malformed or contradicts another."""


class DataError(UdpRayError):
    """The input data or a store cannot be used as asked."""


class LedgerError(UdpRayError):
    """The ledger is missing, is not the one expected, or cannot be reached."""


class LedgerUnavailableError(LedgerError):
    """The ledger's database did not answer. The same call may be made again: none counts twice."""


class PrivacyBudgetExceededError(LedgerError):
    """A run or step would spend more than the budget holds; nothing was spent."""


class ReplayRefusedError(LedgerError):
    """A step was already reserved under other circumstances, so repeating it would leak."""


class FencedError(LedgerError):
    """A newer attempt of this run has begun; this one may no longer write."""


class UnsupportedAdjacencyError(ConfigError):
    """The mechanism has no proven guarantee under the adjacency asked for."""


class UnsupportedModelError(UdpRayError):
    """The model couples users, or has a part that cannot be clipped exactly."""


class CheckpointError(UdpRayError):
    """A checkpoint is missing, cut short or belongs to another run."""


class StorageError(UdpRayError):
    """Something could not be written: no room, a read-only disk, no permission."""


class DivergedError(UdpRayError):
    """Training diverged: weights or held-out losses are not finite, and cannot become so again.

    The run ends with it: it stays charged, its key is destroyed, and it cannot be resumed.
    """


class WorkersLostError(UdpRayError):
    """Training workers died more often than a run may restart them."""


class NoiseCheckError(UdpRayError):
    """The run-time check found noise missing, doubled or wrongly scaled; nothing was trained."""


class BenchmarkError(UdpRayError):
    """A benchmark cannot be run as asked, or a contestant does not compute what the others do."""
