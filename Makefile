# Python 3.11 or later, make and git are all that must be there. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench clean

help:  ## print these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## install into .venv exactly what requirements.lock names (about 7 GB)

demo: $(INSTALLED)  ## pairs -> latents -> model -> metrics on emoji, to runs/demo/report.html (about 10 minutes on 2 cores)
	$(BIN)/python pipelines/demo.py

test: $(INSTALLED)  ## run every test (about 30 minutes on 2 cores)
	$(BIN)/python -m pytest -q

lint: $(INSTALLED)  ## ruff, ruff format and mypy over the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the encoder's speed of light on this machine
	$(BIN)/python benchmarks/encode.py

clean:  ## remove .venv, caches and the demo's run
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than Python 3.11; give another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
