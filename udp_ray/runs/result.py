"""How a run ended, for whoever started it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from udp_ray.reports.statement import PrivacyStatement


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and what it left."""

    run_id: str
    output: Path
    statement: PrivacyStatement
    step: int
    """The last step that the published weights hold."""
    metrics: tuple[dict[str, float], ...]
    """Held-out evaluations by step, with the epsilon spent until then."""
    budget_message: str | None
    """Why training ended before its last step; None if it did not."""
    has_adapters: bool = False
    """Whether only adapters were trained, which stand beside their base model."""

    def to_text(self) -> str:
        """Returns what a person wants to know at the end."""
        rows = ["", "Held-out people", "    step  token loss  perplexity  user loss   epsilon"]
        rows += [
            f"  {row['step']:6.0f}  {row['token_loss']:10.4f}  {row['token_perplexity']:10.2f}"
            f"  {row['user_loss']:9.4f}  {float(row['epsilon']):8.3f}"
            for row in self.metrics
        ]
        held_out = rows if self.metrics else []
        early = f" Training ended early: {self.budget_message}." if self.budget_message else ""
        what = "adapters" if self.has_adapters else "weights"
        opened_by = "AutoPeftModelForCausalLM" if self.has_adapters else "AutoModelForCausalLM"
        written = (
            f"Written to {self.output}: the {what} of step {self.step}, which"
            f" {opened_by}.from_pretrained opens.{early}"
        )
        return "\n".join([self.statement.to_text(), *held_out, "", written])
