# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# As many processes as cores; a file's tests stay together, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-fast gpu-check deploy-check style lint format docs clean

help:
	@echo "make install    prepare $(VENV) with everything for development"
	@echo "make demo       run the whole way on real data; a few minutes, no network"
	@echo "make test       lint, type-check, and run all tests"
	@echo "make test-fast  run the quick tests only"
	@echo "make gpu-check  on a machine with a CUDA GPU: run what needs one, and time it, with PYTHON as it is"
	@echo "make deploy-check  run a policy in the runtimes of others, and write the table of docs/deployment.md"
	@echo "make format     format the code"
	@echo "make docs       build the documentation into site/"
	@echo "make clean      delete $(VENV), caches and the demo's output"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The pinned development environment needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Cannot make $(VENV). On Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)
	@MUJOCO_GL=egl $(BIN)/python -c 'import mujoco; mujoco.GLContext(8, 8).make_current()' >/dev/null 2>&1 || \
		echo "Note: this machine cannot draw off-screen, so there will be no video; everything else works." \
		"On Debian: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri" >&2

demo: $(STAMP)
	$(BIN)/meam demo

style: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lint: style
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Pyright is one process for a minute or more: it runs beside the tests, and is heard after them.
test: style
	@types=$$(mktemp); $(BIN)/pyright >$$types 2>&1 & checker=$$!; \
	$(PYTEST) --durations 10; failed=$$?; \
	wait $$checker || failed=1; cat $$types; rm $$types; exit $$failed

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow'

# Not in $(VENV), whose torch and onnxruntime are those for the CPU.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py

# Other stacks' libraries come into environments of their own, under out/deploy.
deploy-check: $(STAMP)
	$(BIN)/python benchmarks/deploy/check.py --table docs/deployment.md

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf site $(VENV) .pytest_cache .ruff_cache .hypothesis dist demo-output
