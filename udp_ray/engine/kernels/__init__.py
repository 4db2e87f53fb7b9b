"""The clipping kernels: direct and ghost, and the choice between them."""
