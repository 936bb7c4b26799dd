"""Commands of `meam` that produce policy folders."""
