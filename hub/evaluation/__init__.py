"""Zero-shot scores of compositions."""
