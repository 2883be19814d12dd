"""Base models: where they come from, their identity, and loading them."""
