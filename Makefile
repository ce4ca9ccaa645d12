# Every target sets up what it needs: a virtual environment of its own, made once and again when
# pyproject.toml changes.  PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
MODEL ?=
# Of `clients`: only these, by their names on the package index.
CLIENTS ?=
# Further folders with fonts for demo-accuracy; those of the system are found without.
FONTS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTO_VENV := .venv-proto
PROTO_INSTALLED := $(PROTO_VENV)/.installed
# The oldest toolchain that is supported: generated code runs with this version of gRPC and any newer one.
GRPCIO_TOOLS := grpcio-tools==1.75.1
PROTOS := $(wildcard protos/*.proto)
PROTOC = $(PROTO_VENV)/bin/python -m grpc_tools.protoc -I .
PIP := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo demo-accuracy serve test test-gpu clients check fmt fmt-check lint types proto proto-check bench bench-gpu soak clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Set up .venv with everything (done by the other targets when needed)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tessera needs Python 3.11 or newer; choose one with PYTHON=")'
	@echo "installing into $(VENV) (PyTorch is large: this can take minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) -e ".[dev]"
	@touch $@

demo: $(INSTALLED) ## Ask about the bundled picture through all three services
	@$(BIN)/python -m deploy.demo $(MODEL)

demo-accuracy: $(INSTALLED) ## Measure the demo model on 500 held-out questions through the gateway
	@$(BIN)/python -m deploy.demo_training.evaluate $(FONTS:%=--fonts %) $(MODEL)

serve: $(INSTALLED) ## Serve MODEL=folder-or-hub-id, or the demo model, on port 8000 until Ctrl-C
	@exec $(BIN)/tessera serve $(MODEL)

test: $(INSTALLED) ## Run the tests that need no GPU
	@$(BIN)/python -m pytest -q -m "not gpu"

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

clients: $(INSTALLED) ## Ask the gateway with eight real clients (CLIENTS="openai litellm": only these)
	@$(BIN)/python -m tests.clients $(CLIENTS)

check: fmt-check lint types proto-check test ## Format, lint, types, stub freshness, tests: what CI runs

fmt: $(INSTALLED) ## Format the code and sort imports
	@$(BIN)/ruff check --quiet --select I --fix .
	@$(BIN)/ruff format .

fmt-check: $(INSTALLED)
	@$(BIN)/ruff format --check --quiet . || { echo 'not formatted: run "make fmt"'; exit 1; }

lint: $(INSTALLED)
	@$(BIN)/ruff check .

types: $(INSTALLED)
	@$(BIN)/mypy .

$(PROTO_INSTALLED): Makefile
	@$(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python $(PIP) $(GRPCIO_TOOLS)
	@touch $@

proto: $(PROTO_INSTALLED) ## Generate the stubs in protos/ again
	@$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

proto-check: $(PROTO_INSTALLED) ## Check that the stubs in protos/ are those of the .proto files
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" $(PROTOS) && \
	for stub in "$$fresh"/protos/* protos/*_pb2*.py*; do \
	    diff -u "protos/$${stub##*/}" "$$fresh/protos/$${stub##*/}" || \
	    { echo 'stale stubs: run "make proto"'; exit 1; }; \
	done

bench: $(INSTALLED) ## Measure decode and transport on this machine, against their yardsticks
	@$(BIN)/tessera bench

bench-gpu: $(INSTALLED) ## Measure the InternVL3-8B shape on one GPU, against targets and peers (ARGS=...)
	@$(BIN)/python -m deploy.bench.gpu --json docs/benchmarks/h200.json $(ARGS)

soak: $(INSTALLED) ## Put 30 minutes of mixed load on all services: no leak, no error (ARGS="--minutes 1")
	@$(BIN)/python -m deploy.bench.soak $(ARGS)

clean: ## Remove what the targets above made
	@rm -rf $(VENV) $(PROTO_VENV) .venv-clients build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
