"""Choose between ELS and ULS, a group size and a clip norm, before anything is spent.

    python jobs/plan.py --config jobs/configs/plan_example.yaml
    python jobs/plan.py --config FILE --estimate-on PUBLIC_TEXT.parquet --estimate.model MODEL

Under a fixed compute budget (B examples per step, T steps) and (epsilon, delta), it predicts for
both samplers and many group sizes G the noise on the averaged gradient,

    ELS: z C / B, C = L, p = B / (examples kept)
    ULS: z C / M, C = L sqrt(rho + (1 - rho) mean(1/m)), M = B / G, q = M / N

and the data seen, ranks them and draws the figure. z is the accountant's, m = min(G, a user's
examples), L the norm of one example's gradient, rho the mean cosine of two of a user's gradients:
given, or measured by --estimate-on with a model on public or proxy text. Assumed: one L and one
rho, no cosine between users, no bias from clipping. The comparison follows arXiv:2407.07737 (its
equations are not known to us); formulas: udp_ray/dp/planning.py, errors: jobs/mean_estimation.py.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import AliasChoices, Field

from udp_ray.config.base import AbsolutePath, LocalFolder, Section
from udp_ray.config.cli import (
    DRY_RUN,
    JSON,
    parse,
    run_job,
)
from udp_ray.experiments import planner as planning


class PlanJobConfig(Section):
    plan: planning.PlanConfig
    estimate: planning.EstimateConfig = planning.EstimateConfig()
    estimate_on: AbsolutePath | None = Field(
        None, validation_alias=AliasChoices("estimate-on", "estimate_on")
    )
    """File of public or proxy text, keyed by user, on which rho and L are measured."""
    output: LocalFolder | None = None
    """Folder for plan.txt, plan.json and plan.png. Default: only print."""


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PlanJobConfig, __doc__, argv, flags=(JSON, DRY_RUN))
    plan, public_text, output = job.config.plan, job.config.estimate_on, job.config.output
    if job.flag("dry-run"):
        print(planning.describe(plan, public_text))
        return 0
    planning.require_output(output)
    notes = []
    if public_text:
        plan, note = planning.with_estimate(plan, job.config.estimate, public_text)
        notes.append(note)
    workload, predictions = planning.make_plan(plan)
    text = "\n\n".join([*notes, planning.to_text(plan, workload, predictions)])
    print(planning.to_json(plan, workload, predictions) if job.flag("json") else text)
    if output:
        planning.save(Path(output), text, plan, workload, predictions)
    return 0


if __name__ == "__main__":
    run_job(main)
