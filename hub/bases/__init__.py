"""Base models: their sources, their identity, and loading them."""
