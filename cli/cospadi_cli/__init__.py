"""The command line of cospadi."""
