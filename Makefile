# `make prune` and `make test` work on a fresh clone: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# One process a core, since every test computes on one thread; a file stays in one of them, with what it sets up once.
# Files come in the order of tests/conftest.py, not in that of how many tests they hold.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

# Bytecode is kept whatever the shell says: else every process that a test or a launcher starts compiles torch again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: prune test test-all test-oldest bench lint clean

prune: $(READY)
	$(BIN)/accelerate launch recipes/prune.py

test: $(READY)
	$(PYTEST) $(PARALLEL) -m "not slow" --cov=hf_mrpf --cov-report=term --cov-fail-under=90

test-all: $(READY)
	$(PYTEST) $(PARALLEL) --cov=hf_mrpf --cov-report=term --cov-fail-under=90

# Half an hour and more on two cores; each script tells with --help what it can be asked for. Those of the study of
# allocations and of CIFAR-10 on a GPU go on for hours, call after call.
bench: $(READY)
	for name in attack_dtype data_pipeline latency memory planning robust_evaluation sensitivity start trades_step; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[test]"
	touch $(READY)

test-oldest: $(READY)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python -e ".[test]" \
		"torch==2.11.*" "transformers==5.17.*" "huggingface-hub==1.31.*"
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -m "not slow"

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache .coverage
