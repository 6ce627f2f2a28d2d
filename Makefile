# Every target first does the set-up if it is missing or if the requirements changed.
#   make setup PYTHON=/path/to/python3.12     takes that interpreter instead of the first suitable one found

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test e2e style bench clean
.DELETE_ON_ERROR:

BIN := .venv/bin
READY := .venv/.set-up
ROOMS := modeling_mglmm processing datasets_scripts trainer evaluation hub_cards
PYTHON ?=
PYTEST_ARGS ?=

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install the package with the tested versions of constraints.txt

demo: $(READY) ## describe real photographs with the small model (text, masks, HTML in out/)
	@$(BIN)/python -m mglmm.small.demo

test: $(READY) ## run the tests (more options: make test PYTEST_ARGS="-k uscdf")
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 $(PYTEST_ARGS)

e2e: $(READY) ## the whole way in real processes: prepare, train, kill, resume, merge, evaluate, push, reload
	@$(BIN)/python -m tests.end_to_end

style: $(READY) ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf .types && mkdir -p .types/mglmm
	@for entry in mglmm/* $(ROOMS); do ln -s "../../$$entry" .types/mglmm/; done
	@cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p mglmm

bench: $(READY) ## measure the speed and memory of inference, of a training step and of preparing data
	@$(BIN)/python benchmarks/inference.py
	@$(BIN)/python benchmarks/train_step.py
	@$(BIN)/python benchmarks/prepare.py
	@$(BIN)/python benchmarks/scoring.py
	@$(BIN)/python benchmarks/mask_tree.py

clean: ## remove builds, caches and out/ (the set-up itself: rm -r .venv)
	@rm -rf build dist *.egg-info out .types .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, by the pin of constraints.txt alone, so that its large download shows a progress bar and no resolver
# step looks at other builds. Debian and Ubuntu ship python3 without ensurepip: the fallback borrows the system's pip.
$(READY): setup.py pyproject.toml constraints.txt
	@python=""; seen=""; \
	for candidate in $(or $(PYTHON),python3 python python3.14 python3.13 python3.12 python3.11); do \
	    version=$$("$$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue; \
	    seen="$$seen $$candidate=$$version"; \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "mglmm needs Python 3.11 or newer; found:$${seen:- none}." >&2; \
	    echo "Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "[1/3] Creating .venv with $$python ($$version)"; \
	    if "$$python" -c 'import ensurepip' 2>/dev/null; then \
	        "$$python" -m venv --clear .venv; \
	    elif ! { "$$python" -m venv --clear --without-pip .venv && "$$python" -m pip --python $(BIN)/python install -q pip; }; then \
	        echo "$$python has neither ensurepip nor a pip (22.3 or newer) to fill a virtual environment." >&2; \
	        echo "On Debian or Ubuntu: sudo apt install python3-venv, then run make again." >&2; \
	        exit 1; \
	    fi; \
	fi
	@echo "[2/3] Installing torch (some hundred MB; minutes on a slow line)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch setuptools
	@echo "[3/3] Installing mglmm and the tested versions of its requirements"
	@set -o pipefail; PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt \
	    -e '.[dev,small,demo,eval]' \
	    | awk '/^Collecting/ {sub(/[<>=!~;\[(].*/, "", $$2); printf "  %s", $$2; fflush()} /^Installing collected/ {printf "\n  installing them ...\n"; fflush()} /^Successfully installed/ {print "  done"}'
	@touch $(READY)
