"""Selection of experts for a task, and grouping of similar experts."""
