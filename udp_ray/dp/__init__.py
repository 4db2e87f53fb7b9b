"""The core of the guarantee: from accounting to clipping and noise; no Ray, no cluster."""
