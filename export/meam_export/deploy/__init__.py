"""Other forms of an exported policy, for the runtimes that robots have already; made without PyTorch."""
