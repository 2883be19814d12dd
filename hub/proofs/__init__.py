"""Proofs that an added expert computes what its source library computes."""
