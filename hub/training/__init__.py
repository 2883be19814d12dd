"""Training experts and gates."""
