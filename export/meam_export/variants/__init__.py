"""Further graphs of the same networks, with fewer solver steps or lower precision, and what they cost."""
