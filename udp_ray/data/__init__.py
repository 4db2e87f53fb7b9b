"""Rows of text -> a user-sharded token store -> cohorts. Knows neither Ray nor the engine."""
