"""Runs on disk: folders, checkpoints, logs and sweeps."""
