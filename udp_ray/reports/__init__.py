"""Statements, verification, tables and figures."""
