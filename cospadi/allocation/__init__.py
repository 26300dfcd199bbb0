"""How the budget is spread over the groups of layers."""
