"""Which language models are trained, and which of their parameters. A leaf: no engine, no ray."""
