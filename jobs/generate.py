r"""Generate text from a model that a run has published, beside its base model.

    python jobs/generate.py --run runs/first --num_samples 5
    python jobs/generate.py --run runs/first --prompt "how do I" --temperature 0.8
    ray job submit --working-dir . -- python jobs/generate.py --run /data/runs/first \
        --prompts /data/prompts.jsonl --output /data/generated --cluster.num_workers 4

Sampling is post-processing: nothing is charged. With an output folder the statement of the run is
copied beside the texts, and they are compared with held-out text. With more than one worker, with
a cluster.address or as a submitted job, Ray Data executes it; texts do not depend on the workers.
"""

from collections.abc import Sequence

import udp_ray
from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.generate import GenerateConfig
from udp_ray.console import progress
from udp_ray.imports import quick_imports


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(GenerateConfig, __doc__, argv, flags=(DRY_RUN,))
    if job.flag("dry-run"):
        # Imported after the settings are read: an error in them need not wait for torch.
        with progress("loading libraries"), quick_imports():
            from udp_ray.on_ray.generate import dry_run_text

            text = dry_run_text(job.config)
        print(text)
        return 0
    print(f"\n{udp_ray.generate(job.config).to_text()}")
    return 0


if __name__ == "__main__":
    run_job(main)
