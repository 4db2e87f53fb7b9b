"""User-level differentially private fine-tuning of language models, distributed on Ray."""

__version__ = "0.1.0"
