"""Experiments as library functions: demo, pretraining, planner, studies, benchmark."""
