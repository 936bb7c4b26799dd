"""Learning: batches, gradient updates, evaluations and online training."""
