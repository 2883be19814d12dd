"""Tasks: their format, splits and sources."""
