"""Episodes of a policy, one at a time or in a vector of environments."""
