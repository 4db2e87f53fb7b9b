"""Audit the settings of a run: measure a lower bound on epsilon, beside the promised one.

    python jobs/audit.py --config jobs/configs/FILE.yaml --output runs/audit
    python jobs/audit.py --of runs/first --output runs/audit --privacy.num_steps 50

It trains a run of its own with canary users, who are no real users and whose presence is guessed
from what the run releases. The run is charged like any other to the total of its data, and its
model is not for release.
"""

from collections.abc import Sequence

from udp_ray.config.audit import AuditJobConfig, require_option_of, with_settings_of
from udp_ray.config.cli import DRY_RUN, RESUME, parse, run_job
from udp_ray.console import progress


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(AuditJobConfig, __doc__, with_settings_of(argv), flags=(DRY_RUN, RESUME))
    require_option_of(job.config, argv)
    # Imported after the settings are read: a mistake in them need not wait for the libraries.
    with progress("loading libraries"):
        from udp_ray.experiments.audit.run import describe_dry_run, run_audit, settings_of

        config, audited = settings_of(job.config)
    if job.flag("dry-run"):
        print(describe_dry_run(config))
        return 0
    print(f"\n{run_audit(config, audited, resume=job.flag('resume'))}")
    return 0


if __name__ == "__main__":
    run_job(main)
