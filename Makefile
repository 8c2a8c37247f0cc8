# Every target sets up what it needs: a virtual environment of its own, from the locks.
# MEGATRON=0.18.2 takes another of the checked versions of megatron-core, in an environment of its own.
MEGATRON :=
VENV := .venv$(addprefix -,$(MEGATRON))
# Of these the first that starts, can make environments, and has a package of that megatron-core.
PYTHONS := python3.11 python3.12 python3.13
PYTHON ?= $(or $(shell for name in $(PYTHONS); do \
	$$name -c "import ensurepip" 2>/dev/null && $$name $(LOCK_FOR) >/dev/null 2>&1 && echo $$name && break; done),\
	$(error $(or $(patsubst %.,%,$(subst error: ,,$(WHY_NONE))),$(NO_PYTHON))))
# What the first that starts says of that megatron-core.
WHY_NONE = $(shell for name in $(PYTHONS); do \
	$$name -c "import ensurepip" 2>/dev/null && { $$name $(LOCK_FOR) 2>&1 >/dev/null; break; }; done)
NO_PYTHON = none of $(PYTHONS) is on the PATH with its module ensurepip (Debian: python3-venv): install one, or say \
	where one is with PYTHON=
LOCK_FOR := $(strip -m tools.lock_for $(addprefix --megatron ,$(MEGATRON)))
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
# TORCH=cpu takes torch's CPU build wherever the package index has CUDA builds: uv knows where torch keeps it.
TORCH ?=
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE := 1

# `docs` is a folder, too.
.PHONY: docs setup runtime demo test proofs slurm check parity roundtrip versions faults bench credit mini fp8 logits real bridge-check gpu gpu-env gpu-bench gpu-tests gpu-fp8 gpu-wheels clean

setup: $(STAMP)  ## what everything below needs; TORCH=cpu never takes a CUDA build

$(STAMP): $(wildcard requirements*.lock)
	$(call environment,requirements-dev.lock)
	touch $(STAMP)

runtime:  ## only what running needs, without tests and checks; TORCH=cpu as for setup
	$(call environment,requirements.lock)

# $(1) is the lock beside that of megatron-core.
define environment
@lock=$$($(PYTHON) $(LOCK_FOR)) && echo "$(VENV): $$($(PYTHON) --version), $(1), $$lock"
$(PYTHON) -m venv $(VENV)
$(call torch)
$(INSTALL) -r $(1) -r $$($(PYTHON) $(LOCK_FOR))
endef

# A torch that is there already, of any build, fits the locks.
torch = $(if $(TORCH),$(INSTALL) uv && $(RUN) -m uv pip install --quiet --no-deps --torch-backend $(TORCH) --python $(RUN) $$(grep ^torch= requirements.lock))

# Where this machine has GPUs, these still run on the CPU: they start more ranks than it may have.
demo test proofs slurm check parity roundtrip versions faults bench credit mini fp8 logits real bridge-check: export CUDA_VISIBLE_DEVICES :=

# Which Python and megatron-core a target runs on: the environment may be of an earlier day.
which = @echo "$(VENV): $$($(RUN) --version), megatron-core \
	$$($(RUN) -c 'import importlib.metadata as package; print(package.version("megatron-core"))')"

demo: $(STAMP)  ## the whole product on made-up data, TP2×PP2 on this machine, and a report to look at
	$(which)
	$(RUN) -m tools.demo --output runs/demo --overwrite

# Files of tests at once. Many tests start several processes themselves, and many wait.
WORKERS ?= 3

TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --durations=10 tests

test: $(STAMP)  ## the tests, but for the long ones: about twelve minutes
	$(which)
	$(TESTS) -m "not long"

proofs: $(STAMP)  ## the long tests: whole chains, benchmarks in small, programs under faults
	$(TESTS) -m long

slurm: $(STAMP)  ## the scripts of slurm/ on a Slurm of two nodes on this machine; says why not without root and Debian
	$(RUN) -m pytest -v -rs -m slurm --durations=10 tests/slurm

check: $(STAMP)  ## format, lint, types, unit tests: about two minutes
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile tests/unit

parity: $(STAMP)  ## every layout, and every method, against one process
	$(RUN) -m tests.parity --json results/parity.json

roundtrip: $(STAMP)  ## HuggingFace to Megatron and back, every family: bits, log-probs at four layouts, certificates
	$(RUN) -m tests.roundtrip --json results/roundtrip.json

versions: $(STAMP)  ## the tests that matter under every megatron-core and Python, and checkpoints of each read by all
	OMP_NUM_THREADS=1 $(RUN) -m tests.versions --json results/versions.json
	$(RUN) -m tools.docs

faults: $(STAMP)  ## bad inputs, damaged checkpoints, killed runs: each with what the program did; fifteen minutes
	OMP_NUM_THREADS=1 $(RUN) -m tests.faults --json results/faults.json

bench: $(STAMP)  ## speed and memory as ratios to other programs and to the limits; fifteen minutes
	$(RUN) -m bench.speed --json results/bench.json --picture docs/images/bench.svg

credit: $(STAMP)  ## token rewards against known mistakes, and what methods make of them; FAST=1: shows that it runs
	$(RUN) -m bench.credit $(if $(FAST),--fast --json runs/credit.json,--json results/credit.json --picture docs/images/credit.svg) --report runs/credit.html

mini: $(STAMP)  ## the paper in miniature: pairs sampled and scored, DPO, SimPO and TGDPO tuned; FAST=1: shows that it runs
	OMP_NUM_THREADS=1 $(RUN) -m bench.mini $(if $(FAST),--fast,--json results/mini.json --picture docs/images/mini.svg --page docs/miniature.md)

fp8: $(STAMP)  ## what FP8 does to log-probs, token weights and training, emulated on the CPU; docs/fp8.md's tables
	OMP_NUM_THREADS=1 $(RUN) -m bench.fp8 $(if $(FAST),--fast,--json results/fp8.json --picture docs/images/fp8.svg --page docs/fp8.md)

logits: $(STAMP)  ## what rounding logits does to log-probs and token weights, emulated on the CPU; docs/measurements.md's table
	OMP_NUM_THREADS=1 $(RUN) -m bench.logits $(if $(FAST),--fast,--json results/logits.json --page docs/measurements.md)

real: $(STAMP)  ## the main job on a file of real pairs: make real PAIRS=pairs.json
	$(RUN) -m tools.real_run $(PAIRS) --output runs/real

# Megatron-Bridge asks for an older transformers, so it has an environment of its own.
BRIDGE_VENV := .venv-bridge
BRIDGE := $(BRIDGE_VENV)/bin/python

bridge-check: $(STAMP) $(BRIDGE_VENV)/installed  ## weights through Megatron-Bridge's checkpoints and ours, both ways: bits
	OMP_NUM_THREADS=1 $(RUN) -m tests.bridge --python $(BRIDGE) --json results/bridge.json

$(BRIDGE_VENV)/installed: tests/bridge/requirements.txt
	$(PYTHON) -m venv $(BRIDGE_VENV)
	$(subst $(RUN),$(BRIDGE),$(call torch))
	$(subst $(RUN),$(BRIDGE),$(INSTALL)) -r tests/bridge/requirements.txt
	$(subst $(RUN),$(BRIDGE),$(INSTALL)) --no-deps megatron-bridge==0.3.1
	touch $@

# GPU_PYTHON is the machine's Python with torch. WHEELS=folder installs without network; TE=0 leaves Transformer Engine out.
GPU_PYTHON ?= python3
GPU_VENV := .venv-gpu
RESULTS ?= results

gpu:  ## on a GPU machine: the environment, the measurements, the GPU tests; elsewhere says why not
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	$(MAKE) --no-print-directory gpu-env && $(MAKE) --no-print-directory --keep-going gpu-bench gpu-tests gpu-fp8; \
	else echo "make gpu: skipped, because nvidia-smi finds no GPU on this machine."; fi

gpu-env:
	$(GPU_PYTHON) -m tools.gpu_environment $(GPU_VENV) $(WHEELS:%=--wheels %) $(if $(filter 0,$(TE)),--no-transformer-engine)

gpu-bench:
	$(GPU_VENV)/bin/python -m bench.gpu --json $(RESULTS)/gpu.json

gpu-tests:
	$(GPU_VENV)/bin/python -m pytest -v -m gpu --junitxml=$(RESULTS)/gpu-tests.xml tests/gpu

gpu-fp8:
	$(GPU_VENV)/bin/python -m bench.fp8 --json $(RESULTS)/fp8-gpu.json

gpu-wheels: $(STAMP)  ## what `make gpu` needs on a machine without network: HAVE=pip-list.txt leaves out, SPLIT=MiB cuts
	$(RUN) -m tools.gpu_wheels runs/wheels $(HAVE:%=--have %) $(SPLIT:%=--split %) $(if $(filter 0,$(TE)),--no-transformer-engine)

docs: $(STAMP)  ## the tables of docs/ that follow from the code
	$(RUN) -m tools.docs

clean:
	rm -rf .venv .venv-* runs .mypy_cache .ruff_cache .pytest_cache
