"""Flow matching: the path, the ODE and its solvers, likelihoods, adjoints. Tensors in, tensors out."""
