"""Materials from which methods prepare their state: data, texts, activations, logits."""
