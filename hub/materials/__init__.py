"""What methods may ask for when they prepare their state: data, texts, activations, logits."""
