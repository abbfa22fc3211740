# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Nothing is left outside this folder: the environment is .venv, pip keeps no cache.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-long lint docs bench clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m "not long" $(ARGS)

# more real architectures, and the largest
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m long $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/rules.md is made from the rules themselves
docs: $(VENV)/installed
	$(BIN)/python docs/make_rules_page.py

# normtool beside cp, onnxslim, ONNX Runtime and others; writes about 8 GB into .bench
bench: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,peers]'
	$(BIN)/python tests/benchmarks/fold_cost.py
	$(BIN)/python tests/benchmarks/start_up.py
	$(BIN)/python -m tests.benchmarks.fold_modules
	$(BIN)/python tests/benchmarks/many_ops.py
	$(BIN)/python -m tests.benchmarks.swap_cost
	$(BIN)/python -m tests.benchmarks.what_remains
	$(BIN)/python -m tests.benchmarks.swap_speed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .demo .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
