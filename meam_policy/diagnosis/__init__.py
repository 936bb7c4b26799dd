"""Checking a policy, and a machine, before they act."""
