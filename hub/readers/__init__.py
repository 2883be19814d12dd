"""Readers: logits over the choices of a question, for every kind of base, with gradients."""
