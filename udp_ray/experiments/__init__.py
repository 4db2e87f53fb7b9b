"""Studies and recipes as library functions: the demo, its base model, the paper's experiments."""
