"""Training: optimisers."""
