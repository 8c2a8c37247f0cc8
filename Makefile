# Every target sets up what it needs: a virtual environment of its own, from the lock.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python -W ignore
STAMP := $(VENV)/installed
export PYTHONWARNINGS := ignore
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test check parity bench credit real clean

setup: $(STAMP)

$(STAMP): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $(STAMP)

demo: $(STAMP)  ## the whole product on made-up data, TP2×PP2 on this machine, and a report to look at
	$(RUN) -m tools.demo --output runs/demo --overwrite

test: $(STAMP)  ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --durations=10 tests

check: $(STAMP)  ## format, lint, types, unit tests: under a minute
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/unit

parity: $(STAMP)  ## every layout, and every method, against one process
	$(RUN) -m tests.parity --json results/parity.json

bench: $(STAMP)  ## speed and memory as ratios to other programs and to the limits; minutes
	$(RUN) -m bench.run --json results/bench.json --picture docs/images/bench.svg

credit: $(STAMP)  ## token rewards against known mistakes, and what methods make of them; FAST=1: shows that it runs
	$(RUN) -m bench.credit $(if $(FAST),--fast --json runs/credit.json,--json results/credit.json --picture docs/images/credit.svg) --report runs/credit.html

real: $(STAMP)  ## the main job on a file of real pairs: make real PAIRS=pairs.json
	$(RUN) -m tools.real_run $(PAIRS) --output runs/real

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
