"""Data sets: reading, checking and caching them, and sampling action chunks."""
