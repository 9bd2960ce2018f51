# headrace: the commands of the project. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo test lint format bench chaos chaos-full gpu-check redis clean

help:           ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

setup: $(READY) ## virtual environment with everything that demo and test need

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)': install Python 3.11 or newer, or pass PYTHON=..."; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headrace needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: $(READY)  ## 200 questions through Valkey, two Ray ranks and the JSONL sink; prints the share answered exactly
	$(BIN)/headrace demo

test: $(READY) redis ## the whole test suite
	$(BIN)/python -m pytest

redis:          ## Debian's redis-server for the ledger tests, where this user may install it
	@command -v redis-server >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server; } >/dev/null 2>&1 || \
	  echo "make: redis-server could not be installed: the ledger tests run on the embedded Valkey only"

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## ledger and engine benchmarks on the demo model; one JSON line each
	$(BIN)/python bench/queue.py
	$(BIN)/python bench/engine.py --model examples/demo_model --workload W1

chaos: $(READY) redis ## the five-minute chaos lane: processes, servers and lines broken; nothing lost, nothing twice
	$(BIN)/python -m tests.chaos.run --out bench/results/chaos.json
	$(BIN)/python -m tests.chaos.real --rows 1000 --faults rank,hang --most 2 --out bench/results/chaos.json

chaos-full: $(READY) redis ## every cell of the fault matrix, on both servers
	$(BIN)/python -m tests.chaos.run --full --out bench/results/chaos-full.json
	$(BIN)/python -m tests.chaos.run --full --server redis-7.0 --out bench/results/chaos-full.json
	$(BIN)/python -m tests.chaos.real --out bench/results/chaos-full.json
	$(BIN)/python -m pytest tests/chaos/test_guards.py

gpu-check:      ## checks and times the GPU code on a bare machine (torch, triton, transformers, safetensors, msgpack)
	$(PYTHON) bench/gpu_check.py

clean:          ## removes the virtual environment and build output
	rm -rf $(VENV) build dist *.egg-info
