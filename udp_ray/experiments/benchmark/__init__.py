"""The benchmark: speed, memory and overhead of private training beside its peers."""
