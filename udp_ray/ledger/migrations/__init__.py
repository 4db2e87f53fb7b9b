"""Alembic's folder: one numbered file per version of the ledger's tables."""
