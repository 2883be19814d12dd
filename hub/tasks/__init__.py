"""Tasks: their format, their splits and their sources."""
