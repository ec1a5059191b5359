# `make demo` and `make test` set up .venv first, and skip what is already installed.
PYTHON ?= python3
BIN := .venv/bin
DEMO_SEEDS ?= 8

# Without --no-compile, pip compiles every module of every package; Python compiles only those that are imported.
PIP := -m pip install --quiet --no-compile
INSTALL := $(BIN)/python $(PIP) --constraint constraints.txt

# Every command and every test process would otherwise compile torch and pandas again.
unexport PYTHONDONTWRITEBYTECODE

# One process per core, so one thread in each.
PYTEST := -m pytest --numprocesses auto
CORE := tests/gradscope/forward tests/gradscope/backward tests/gradscope/jacobians tests/gradscope/coefficients

.PHONY: demo test lint bench docs setup test-lowest clean

demo: .venv/.project
	@$(BIN)/python -m experiments.measure -m study=architectures sweep=demo launcher=processes "seed=range($(DEMO_SEEDS))"
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

# The site, with the Markdown pages, the API, and the examples and lessons, which are executed.
docs: .venv/.docs
	@$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --conf-dir docs . build/site
	@echo "Open build/site/index.html."

.venv/.docs: .venv/.project
	$(INSTALL) --editable ".[docs,report]"
	@touch $@

# For development: every extra and the development tools.
setup: .venv/.development

# The project alone, which is all that the demo needs.
.venv/.project: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/.development: .venv/.project
	$(INSTALL) --editable ".[dev,digits,zoo,sinks,slurm,optuna,lightning,transformers,report]"
	@touch $@

# The core tests with the lowest versions that pyproject.toml allows, on Python 3.12 where there is one.  On Linux with
# x86-64 processors torch brings CUDA: the environment takes 5 GB.
PYTHON312 := $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || \
	ls $$(pyenv root 2>/dev/null)/versions/3.12.*/bin/python3.12 2>/dev/null | tail -1)

test-lowest: .venv-lowest/.done
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST) $(CORE)

.venv-lowest/.done: pyproject.toml constraints-lowest.txt
	$(or $(PYTHON312),$(PYTHON)) -m venv .venv-lowest
	.venv-lowest/bin/python $(PIP) --no-cache-dir --constraint constraints-lowest.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv .venv-lowest build *.egg-info
