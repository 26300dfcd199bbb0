# What developers run; every target uses the environment of README command two.
PY ?= .venv/bin/python

.PHONY: check lint test laws docs

check: lint  ## lint, types and the fast tests
	$(PY) -m pytest -n logical -m "not slow and not integration"

lint:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test:  ## all tests but those on real models
	$(PY) -m pytest -n logical

laws:  ## the laws of one solver: make laws SOLVER=htp
	$(PY) -m pytest tests/solvers/test_laws.py -k "$(SOLVER)"

docs:  ## what is generated: the command line's page and the picture of the rooms
	$(PY) docs/make_cli.py
	$(PY) docs/make_architecture.py
