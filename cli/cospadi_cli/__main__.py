"""``python -m cospadi_cli``: the command line without its script."""

from cospadi_cli.main import main

main()
