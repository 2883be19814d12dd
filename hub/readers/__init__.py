"""From inputs to logits over their choices, for every kind of base; gradients flow through."""
