"""Keeping the store: checked, repaired, counted, collected; who holds what in it."""
