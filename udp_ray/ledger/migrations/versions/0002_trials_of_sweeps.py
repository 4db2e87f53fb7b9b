"""Trials: runs that belong to a declared sweep, whose row has paid for all of them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "udp_ray_trials",
        sa.Column("run_id", sa.String(255), primary_key=True),
        sa.Column("sweep", sa.String(255), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("configuration", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["udp_ray_runs.run_id"]),
        sa.ForeignKeyConstraint(["sweep"], ["udp_ray_runs.run_id"]),
    )
