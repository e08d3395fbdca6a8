"""What the pre-training examples share: models, text, training, results."""
