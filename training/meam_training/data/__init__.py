"""Data sets: reading, checking, caching, chunks of actions."""
