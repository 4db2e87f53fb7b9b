"""The ledger: the durable record of what was spent on a dataset, which refuses to overspend."""
