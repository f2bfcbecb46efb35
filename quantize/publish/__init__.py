"""What stands beside published files: the model card, checksums and pictures."""
