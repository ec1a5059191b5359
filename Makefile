# Two commands do everything: `make demo` and `make test`.  Both set up .venv first, and skip what is done.
PYTHON ?= python3
BIN := .venv/bin
DEMO_SEEDS ?= 8

.PHONY: demo test setup lint bench clean

demo: setup
	@$(BIN)/python -m experiments.measure -m study=architectures sweep=demo "seed=range($(DEMO_SEEDS))"
	@$(BIN)/python -m experiments.collect sweep=demo
	@$(BIN)/python -m experiments.figures study=architectures sweep=demo

# A process for each core, so one thread in each; the tests of one file stay together and share its fixtures.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Beside vmap(jacrev), torch.autograd.functional.jacobian and curvlinops; nothing else should run meanwhile.
bench: setup
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	@$(BIN)/python -m benchmarks.coefficients

setup: .venv/.done

# Everything is held to the versions that were tested; the marker is younger than what it was made from.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,digits,zoo,sinks,slurm,optuna,lightning,transformers]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
