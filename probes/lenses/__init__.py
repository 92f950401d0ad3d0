"""What heads write to the logits."""
