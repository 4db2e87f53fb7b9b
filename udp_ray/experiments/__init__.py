"""Experiments as library functions: demo, pretraining, planner, mean estimation, benchmark."""
