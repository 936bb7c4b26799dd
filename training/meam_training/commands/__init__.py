"""Commands of `meam` that record data, train policies and time training."""
