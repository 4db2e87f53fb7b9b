"""Helpers of the tests, importable by the processes and Ray workers that tests start."""
