"""Experts from full fine-tunes: dense or sparse task vectors, and LoRAs."""
