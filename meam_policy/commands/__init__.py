"""Commands of `meam` that need only the runtime."""
