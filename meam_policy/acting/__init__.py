"""From observation to action: flattening, action queues, safety checks."""
