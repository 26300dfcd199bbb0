"""What makes other libraries understand our checkpoints."""
