"""Acting at a fixed rate."""
