"""Names of experts and bases, and what they refer to."""
