# Set-up, the main job, the tests and the checks. `make help` lists them.

VENV ?= .venv
ARGS ?=
WORKERS ?= 2
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint environment clean

# Without its bytecode cache every start pays for compiling torch and Avalanche again.
unexport PYTHONDONTWRITEBYTECODE
# The packages must come from the environment, and nothing from the user's own folders.
unexport PYTHONPATH
unexport PYTHONHOME
export PYTHONNOUSERSITE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.fedcl-run
DEV_STAMP := $(VENV)/.fedcl-dev
TYPES := build/types

help:
	@echo 'make demo          finetune and the default stack on real digits: compared, drawn, reported'
	@echo 'make test          all tests; ARGS="tests/fedcl -k name" runs some, WORKERS=0 in one process'
	@echo 'make lint          ruff and mypy'
	@echo 'make environment   only what the tests and the linters need'
	@echo 'make clean         removes the environment and what was built, not your runs'
	@echo 'Each makes the environment $(VENV) first where it is missing (PYTHON=... chooses the Python).'

demo: $(RUN_STAMP)
	@$(BIN)/python -m fedcl demo $(ARGS)

# Two processes of one thread each: two threads in one process would leave the second processor idle most of the time.
test: $(DEV_STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# mypy wants a package in one folder, and fedcl.strategies and fedcl.scenarios lie beside fedcl.
lint: $(DEV_STAMP)
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fedcl
	@ln -s $(CURDIR)/fedcl/* $(CURDIR)/strategies $(CURDIR)/scenarios $(CURDIR)/experiments $(TYPES)/fedcl/
	@failed=0; \
	$(BIN)/python -m ruff check --output-format concise . || failed=1; \
	$(BIN)/python -m ruff format --check . || failed=1; \
	(cd $(TYPES) && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p fedcl) >$(TYPES).log || failed=1; \
	sed -E 's#^fedcl/(strategies|scenarios|experiments)/#\1/#' $(TYPES).log; \
	exit $$failed

environment: $(DEV_STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(RUN_STAMP): pyproject.toml constraints.txt .ci/install
	@PYTHON="$(PYTHON)" bash .ci/install $(VENV) run
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt .ci/install
	@PYTHON="$(PYTHON)" bash .ci/install $(VENV) dev
	@touch $(RUN_STAMP) $@
