"""Comparison of variants of a training run on public text, over data sets and seeds."""
