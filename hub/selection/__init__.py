"""Choosing experts for a task, and grouping them: measures, similarities, and the recipes of both."""
