"""Dictionary solvers: one whitened target in, a dictionary and sparse coefficients out."""
