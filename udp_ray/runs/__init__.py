"""Runs and sweeps outside of training: admission, registration, result, provenance. No Ray."""
