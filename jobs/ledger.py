"""Show what was spent on a dataset, by which run, and what is left; set its total budget.

`abandon` refunds a run that never reserved a step. A sweep of release best keeps its whole charge.

python jobs/ledger.py show --config jobs/configs/FILE.yaml
python jobs/ledger.py show --ledger sqlite:////data/ledger.sqlite --dataset chats --json
python jobs/ledger.py set-budget --config FILE --epsilon 8 --delta 1e-6
python jobs/ledger.py abandon --config FILE --run NAME
"""

import json
from collections.abc import Sequence

from udp_ray.config.cli import DRY_RUN, JSON, parse, run_job
from udp_ray.reports.tables import spending_to_json, spending_to_text
from udp_ray.runs.ledger_commands import COMMANDS, LedgerConfig, run_command


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(LedgerConfig, __doc__, argv, flags=(JSON, DRY_RUN), commands=COMMANDS)
    spending = run_command(job.command or "show", job.config, dry_run=job.flag("dry-run"))
    print(
        json.dumps(spending_to_json(spending)) if job.flag("json") else spending_to_text(spending)
    )
    return 0


if __name__ == "__main__":
    run_job(main)
