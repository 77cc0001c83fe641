# The two commands of the README, and what they need. Everything lands in .venv and in the user's
# cache directory; nothing needs root. Run `make help` for the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: help setup demo test lint lock clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## Make .venv with locked dependencies, and find or build a MinIO server

demo: setup  ## Show pages going down both tiers and coming back on another node
	@$(BIN)/python -m memkv_sglang.demo

test: setup  ## Run every test
	@$(BIN)/pytest

lint: setup  ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock:  ## Write locks/ anew from pyproject.toml
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --upgrade --group dev pyproject.toml -o locks/dev.txt

clean:  ## Remove .venv and caches inside the checkout
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: locks/dev.txt pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" tools/setup.sh
	@touch $@
