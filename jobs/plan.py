"""Choose between ELS and ULS, a group size and a clip norm, before any budget is spent.

    python jobs/plan.py
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

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, JSON, parse, run_job
from udp_ray.config.planner import PlanJobConfig
from udp_ray.console import progress
from udp_ray.io import OutputFolder

EXAMPLE = Path(__file__).parent / "configs" / "plan_example.yaml"
NOTE = "Numbers of the shipped example, jobs/configs/plan_example.yaml: give yours by --config."


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PlanJobConfig, __doc__, argv, flags=(JSON, DRY_RUN), default_file=EXAMPLE)
    plan, public_text, output = job.config.plan, job.config.estimate_on, job.config.output
    notes = [NOTE] if job.is_default_file else []
    if job.flag("dry-run"):
        print("\n".join([*notes, plan.to_text(public_text)]))
        return 0
    if output:
        OutputFolder(Path(output)).check(resume=False)
    # Imported only now: mistakes in the settings are found without waiting for SciPy.
    with nullcontext() if job.flag("json") else progress("loading libraries"):
        from udp_ray.experiments import planner

        if public_text:
            plan, note = planner.with_estimate(plan, job.config.estimate, public_text)
            notes.append(note)
        comparison = planner.compare(plan)
    text = "\n\n".join([*notes, comparison.to_text()])
    print(comparison.to_json() if job.flag("json") else text)
    if output:
        comparison.save(Path(output), text)
        print(f"Text, numbers and figure: {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_job(main)
