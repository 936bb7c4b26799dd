"""Runs on disk: folders, checkpoints, logs, sweeps."""
