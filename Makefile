# `make prune` and `make test` work on a fresh clone: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: prune test test-all lint clean

prune: $(READY)
	$(BIN)/accelerate launch recipes/prune.py

test: $(READY)
	$(PYTEST) -m "not slow" --cov=hf_mrpf --cov-report=term

test-all: $(READY)
	$(PYTEST) --cov=hf_mrpf --cov-report=term

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override requirements/overrides.txt -e ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .coverage
