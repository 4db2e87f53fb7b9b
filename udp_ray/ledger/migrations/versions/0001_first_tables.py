"""The first tables: datasets and their budgets, runs, keys, attempts, reserved steps, commits."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

DATASET = ("udp_ray_datasets.name",)
RUN = ("udp_ray_runs.run_id",)


def upgrade() -> None:
    """Makes the tables."""
    _make_datasets()
    _make_runs()
    _make_steps()


def _text(name: str, length: int, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=nullable)


def _row_number() -> sa.Column[int]:
    return sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True)


def _make_datasets() -> None:
    op.create_table(
        "udp_ray_ledger",
        sa.Column("id", sa.String(32), primary_key=True),
        _text("created_at", 32),
    )
    op.create_table(
        "udp_ray_datasets",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("user_hash_key", sa.LargeBinary(), nullable=False),
        _number("total_epsilon", nullable=True),
        _number("total_delta", nullable=True),
        _text("created_at", 32),
    )
    op.create_table(
        "udp_ray_fingerprints",
        _row_number(),
        _text("dataset", 255),
        _text("digest", 255),
        _text("seen_at", 32),
        sa.ForeignKeyConstraint(["dataset"], DATASET),
    )
    op.create_table(
        "udp_ray_budget_changes",
        _row_number(),
        _text("dataset", 255),
        _number("total_epsilon"),
        _number("total_delta"),
        _number("spent_epsilon"),
        _number("spent_delta"),
        _text("changed_at", 32),
        sa.ForeignKeyConstraint(["dataset"], DATASET),
    )


def _make_runs() -> None:
    op.create_table(
        "udp_ray_runs",
        _row_number(),
        sa.Column("run_id", sa.String(255), nullable=False, unique=True),
        _text("dataset", 255),
        _number("epsilon"),
        _number("delta"),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        _text("state", 16),
        sa.Column("attempt", sa.Integer(), nullable=False),
        _text("key_id", 16),
        sa.Column("charged_steps", sa.BigInteger(), nullable=False),
        _text("start_digest", 255, nullable=True),
        _text("admitted_at", 32),
        _text("ended_at", 32, nullable=True),
        sa.ForeignKeyConstraint(["dataset"], DATASET),
    )
    op.create_table(
        "udp_ray_keys",
        sa.Column("run_id", sa.String(255), primary_key=True),
        sa.Column("key_id", sa.String(16), primary_key=True),
        sa.Column("secret", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], RUN),
    )
    op.create_table(
        "udp_ray_attempts",
        sa.Column("run_id", sa.String(255), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        _text("key_id", 16),
        _text("plan_digest", 255),
        _text("config_digest", 255),
        _text("code_digest", 255),
        _text("store_digest", 255),
        _text("begun_at", 32),
        sa.ForeignKeyConstraint(["run_id"], RUN),
    )


def _make_steps() -> None:
    op.create_table(
        "udp_ray_steps",
        sa.Column("run_id", sa.String(255), primary_key=True),
        sa.Column("key_id", sa.String(16), primary_key=True),
        sa.Column("step", sa.BigInteger(), primary_key=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        _text("start_digest", 255),
        sa.ForeignKeyConstraint(["run_id"], RUN),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "udp_ray_commits",
        sa.Column("run_id", sa.String(255), primary_key=True),
        sa.Column("step", sa.BigInteger(), primary_key=True),
        _text("key_id", 16),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("checkpoint", sa.Text(), nullable=False),
        _text("digest", 255),
        sa.ForeignKeyConstraint(["run_id"], RUN),
    )
