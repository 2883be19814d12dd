"""Learned merges: the data that they look at, and the coefficients that they find."""
