"""The networks of a run."""
