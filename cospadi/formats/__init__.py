"""How factorisations are stored; the contract is docs/format.md."""
