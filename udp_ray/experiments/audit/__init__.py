"""Audits: runs with canary users, and the lower bound on epsilon that they measure."""
