"""From a recipe to a plan and its lock file."""
