"""The benchmark: speed, memory and overhead of private training over non-private training."""
