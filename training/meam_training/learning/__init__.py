"""What moves the networks: batches, gradients, evaluations, online steps."""
