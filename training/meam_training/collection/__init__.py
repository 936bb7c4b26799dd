"""Recording data sets."""
