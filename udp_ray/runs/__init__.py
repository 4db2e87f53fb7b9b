"""Admission, registration and results of runs and sweeps, and provenance. No Ray."""
