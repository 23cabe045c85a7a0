"""Meta-models to start from."""
