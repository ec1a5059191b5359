# `make demo` and `make test` set up .venv first, and skip what is already installed.
PYTHON ?= python3
BIN := .venv/bin
DEMO_SEEDS ?= 8

# Without --no-compile, pip compiles every module of every package; Python compiles only those that are imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: demo test lint bench setup clean

demo: .venv/.project
	@$(BIN)/python -m experiments.measure -m study=architectures sweep=demo "seed=range($(DEMO_SEEDS))"
	@$(BIN)/python -m experiments.collect sweep=demo
	@$(BIN)/python -m experiments.figures study=architectures sweep=demo

# One process per core, so one thread in each; the tests of one file stay together and share its fixtures.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

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

clean:
	rm -rf .venv build *.egg-info
