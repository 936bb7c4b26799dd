"""Commands of `meam` that produce data and checkpoints."""
