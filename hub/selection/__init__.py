"""Choosing experts for a task, and grouping them: measures, similarities, recipes."""
