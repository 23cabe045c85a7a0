# Every target sets up its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export MPLBACKEND ?= Agg
export OMP_NUM_THREADS ?= 1

.PHONY: install format lint test demo tutorials bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "pip>=25.1" "setuptools>=77.0.3" wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $(STAMP)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	PYROBOOST_SMOKE=1 $(BIN)/python -m pytest -p no:benchmark --numprocesses 2 --dist worksteal

demo: $(STAMP)
	$(BIN)/pyroboost demo

tutorials: $(STAMP)
	$(BIN)/python -m pytest --nbmake --overwrite tutorials

bench: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/benchmarks --benchmark-only -s

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
