"""Commands of `meam` that export policies, time them and run the demo."""
