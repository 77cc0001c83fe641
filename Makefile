# Run `make help` for the list of commands. They write to .venv, build and the user's cache directory,
# and need no root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
RESULTS ?= build/benchmarks

.PHONY: help setup demo test test-ci test-again test-all test-python test-serving test-patched bench lint docs audit test-sglang sglang-diff lock clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## Make .venv with locked dependencies, and find or build a MinIO server

demo: setup  ## Show two SGLang servers share every prefix; ARGS="--tokens 4096", "--keep", "--help"
	@$(BIN)/python -m memkv_testbed.demo $(ARGS)

# For two cores: many tests wait for servers, timeouts or disks.
PYTEST := $(BIN)/pytest -n 3 --dist loadscope --no-loadscope-reorder

test: setup  ## Run the tests of a change: at least one for each promise, at most 10 minutes
	@$(PYTEST) -m "not slow and not soak" --no-skips $(ARGS)

test-ci: setup  ## Run those and the soak tests, as .ci/run does
	@$(PYTEST) -m "not slow" --no-skips --durations=25 $(ARGS)

test-again: setup  ## Run the tests that failed last, one after the other
	@$(BIN)/pytest --last-failed --last-failed-no-failures none $(ARGS)

test-all: setup  ## Run every test
	@$(PYTEST) --durations=25 $(ARGS)

test-python:  ## Run the fast tests on each installed Python, without SGLang; PYTHONS="3.12"
	@tools/test-pythons.sh $(PYTHONS)

test-serving: setup  ## Run the end-to-end tests alone: SGLang servers, MinIO, SGLang's router
	@$(BIN)/pytest tests/serving $(ARGS)

test-patched: setup  ## Run them with every server patched instead of with the plugin
	@MEMKV_TEST_PATCHED=1 $(BIN)/pytest tests/serving

SGLANG_TESTS := tests/cpu_platform tests/plugin tests/patching tests/serving

test-sglang: setup  ## Run them with another SGLang: VERSION=0.5.22, ARGS="tests/plugin -x"
	@tools/test-sglang.sh "$(VERSION)" $(or $(ARGS),$(SGLANG_TESTS))

bench: setup  ## Run every benchmark, end with the table of targets; ARGS="--quick", RESULTS=folder
	@mkdir -p $(RESULTS)
	@$(BIN)/python -m benchmarks all --json $(RESULTS)/$$(date +%F).json $(ARGS)

lint: setup docs  ## Check style, format, types, spelling, layers, names and the documentation
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell
	@PYTHONPATH=. $(BIN)/lint-imports --no-logo
	@$(BIN)/python tools/check_names.py

docs: setup  ## Build the documentation site into build/docs
	@$(BIN)/sphinx-build -qW --keep-going docs build/docs

audit: setup  ## Look for known vulnerabilities in the locked dependencies
	@$(BIN)/python tools/audit.py

sglang-diff: setup  ## Compare what the project uses of SGLang with another version: VERSION=0.5.24
	@PYTHONPATH=. $(BIN)/python -m tools.sglang_diff $(VERSION) $(ARGS)

lock:  ## Update locks/requirements.txt to the newest allowed versions
	$(or $(shell command -v uv),$(BIN)/uv) pip compile -q --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --no-header --no-annotate --excludes locks/gpu-only.txt \
	  --extra bench --extra encryption --extra plan --group dev --group docs pyproject.toml locks/sglang.in -o locks/requirements.txt

clean:  ## Remove .venv, built documentation and wheels, and caches inside the checkout
	rm -rf $(VENV) build/docs build/pythons .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: locks/requirements.txt pyproject.toml cpu-platform/pyproject.toml tools/setup.sh \
  hatch_build.py $(wildcard memkv_sglang/tiers/minio/http/*.pyx memkv_sglang/tiers/minio/http/*.pxd)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" tools/setup.sh
	@touch $@
