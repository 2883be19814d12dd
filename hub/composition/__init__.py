"""From a plan to a composed model."""
