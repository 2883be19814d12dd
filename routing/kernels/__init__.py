"""Kernels: ways to compute the weighted outputs of a group's experts, one file per kernel."""
