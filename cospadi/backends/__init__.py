"""How factorised layers are multiplied at run time; see docs/backends.md."""
