"""What the engine asks of an accountant, be it a ledger, a Ray actor or a test."""

from __future__ import annotations

from typing import Protocol


class Accountant(Protocol):
    """Grants each step before its noise is drawn, and records checkpoints; asked by rank 0."""

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved.

        Args:
            step: The step about to draw its noise, 1 to num_steps.
            starting_checkpoint: Digest of the last committed checkpoint before this step, or of
                the initial weights while there is none.

        Raises:
            PrivacyBudgetExceededError: The step would overspend; training ends well.
            DivergedError: The last commit is of a model that diverged; training ends likewise.
            ReplayRefusedError: The step was reserved under other circumstances.
            FencedError: A newer attempt has begun.
        """

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that all steps up to this one are in the checkpoint at `location`."""
