"""Task vectors of fully fine-tuned models: dense, sparse, or as LoRAs."""
