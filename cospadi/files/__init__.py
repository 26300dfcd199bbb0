"""Files that are whole or not there, locks, and names and JSON that cannot be trusted."""
