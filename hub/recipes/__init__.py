"""Recipes, the plans that they resolve to, and their lock files."""
