# `make demo` and `make test` set up .venv first, and skip what is already installed.
PYTHON ?= python3
BIN := .venv/bin
DEMO_SEEDS ?= 8

# Without --no-compile, pip compiles every module of every package; Python compiles only those that are imported.
PIP := -m pip install --quiet --no-compile
INSTALL := $(BIN)/python $(PIP) --constraint constraints.txt

# One process per core, so one thread in each.
PYTEST := -m pytest --numprocesses auto
CORE := tests/gradscope/forward tests/gradscope/backward tests/gradscope/jacobians tests/gradscope/coefficients

.PHONY: demo test lint bench setup test-lowest test-python312 clean

demo: .venv/.project
	@$(BIN)/python -m experiments.measure -m study=architectures sweep=demo "seed=range($(DEMO_SEEDS))"
	@$(BIN)/python -m experiments.collect sweep=demo
	@$(BIN)/python -m experiments.figures study=architectures sweep=demo

# The tests of one file stay together and share its fixtures.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --dist loadfile

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Compares with vmap(jacrev), torch.autograd.functional.jacobian and curvlinops; run nothing else meanwhile.
bench: setup
	@$(INSTALL) --editable ".[bench]"
	@$(BIN)/python -m benchmarks.coefficients

# For development: every extra and the development tools.
setup: .venv/.development

# The project alone, which is all that the demo needs.
.venv/.project: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/.development: .venv/.project
	$(INSTALL) --editable ".[dev,digits,zoo,sinks,slurm,optuna,lightning,transformers]"
	@touch $@

# The core tests with other versions, in environments of their own.  On Linux with x86-64 processors torch brings CUDA:
# each environment takes 5 GB.
test-lowest: .venv-lowest/.done
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST) $(CORE)

.venv-lowest/.done: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python $(PIP) --no-cache-dir --constraint constraints-lowest.txt --editable ".[test]"
	@touch $@

# Python 3.12 from the PATH, else the newest that pyenv has.
PYTHON312 ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || \
	ls $$(pyenv root 2>/dev/null)/versions/3.12.*/bin/python3.12 2>/dev/null | tail -1)

test-python312:
	@if [ -z "$(PYTHON312)" ]; then echo "test-python312 skipped: found no Python 3.12, neither on the PATH nor in pyenv"; \
	else $(MAKE) --no-print-directory .venv-python312/.done && \
	OMP_NUM_THREADS=1 .venv-python312/bin/python $(PYTEST) $(CORE); fi

.venv-python312/.done: pyproject.toml constraints.txt
	$(PYTHON312) -m venv .venv-python312
	grep -v '^torch' constraints.txt > .venv-python312/constraints.txt
	.venv-python312/bin/python $(PIP) --no-cache-dir --constraint .venv-python312/constraints.txt --editable ".[test]" torch==2.11.0
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-python312 build *.egg-info
