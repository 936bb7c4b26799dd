"""Other graphs of the same networks: fewer steps, lighter weights, and what they cost."""
