"""Dense models from outside: opened, checked, their tensors by name, their linear layers and groups."""
