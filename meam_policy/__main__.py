"""`python -m meam_policy` is `meam`."""

from meam_policy.cli import main

main()
