"""What was asked for: how to compress, and where and within what to work."""
