"""The errors that a caller may catch.

The user can fix every error here except `GuaranteeError`: its text is one or two sentences that
name the field, the value and the remedy. Jobs print the text and exit with status 2, without a
traceback. A `GuaranteeError` is a defect of udp-ray and shows its traceback.

Errors travel between processes as pickles, so each one is rebuilt from its single message.
"""


class UdpRayError(Exception):
    """Base class of all errors that a user can fix."""


class GuaranteeError(RuntimeError):
    """An invariant of the privacy guarantee does not hold: a defect, not a user's error.

    Raised instead of `assert`, which `python -O` removes. It is no `UdpRayError`, so jobs end with
    its traceback and suggest no remedy; what was charged stays charged.
    """


class RankFailedError(RuntimeError):
    """Rank 0 failed with an exception that is no user's error; raised on the other ranks.

    It is not a `UdpRayError`: no user can fix it, and workers that fail with it may be restarted.
    """


class ConfigError(UdpRayError, ValueError):
    """A setting is missing, malformed or contradicts another."""


class DataError(UdpRayError):
    """The input data or a store cannot be used as requested."""


class LedgerError(UdpRayError):
    """The ledger is missing, is not the expected one, or cannot be reached."""


class LedgerUnavailableError(LedgerError):
    """The ledger's database did not answer. The call may be retried: none is counted twice."""


class PrivacyBudgetExceededError(LedgerError):
    """A run or step would spend more than is left of the budget; nothing was spent."""


class ReplayRefusedError(LedgerError):
    """A step was reserved under other settings, code, data or weights; repeating it would leak."""


class FencedError(LedgerError):
    """A newer attempt of this run has begun; this one may no longer write."""


class PreemptedError(UdpRayError):
    """A worker is about to be taken away: the step was not reserved, and training pauses here.

    Training writes a checkpoint and continues from it with other workers.
    """


class UnsupportedAdjacencyError(ConfigError):
    """The mechanism has no proven guarantee under the requested adjacency."""


class UnsupportedModelError(UdpRayError):
    """The model couples users, or has a part whose gradients cannot be clipped exactly."""


class CheckpointError(UdpRayError):
    """A checkpoint is missing, truncated or belongs to another run."""


class StorageError(UdpRayError):
    """Something could not be written: no room, a read-only disk, no permission."""


class DivergedError(UdpRayError):
    """Training diverged: weights or held-out losses are no longer finite.

    This ends the run: it stays charged, its key is destroyed, and it cannot be resumed.
    """


class WorkersLostError(UdpRayError):
    """Training workers failed more often than cluster.max_failures allows."""


class NoiseCheckError(UdpRayError):
    """The check at the start of a run found noise missing, doubled or wrongly scaled.

    Nothing was trained.
    """


class BenchmarkError(UdpRayError):
    """A benchmark cannot run as requested, or an implementation computes another result."""
