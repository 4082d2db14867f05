"""Training: models from scratch, through the Hugging Face Trainer, with a loss that never holds all logits."""
