# make help lists the targets. Everything runs in .venv, which `setup` makes from requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
LOGDIR ?=
PORT ?= 6006

.DEFAULT_GOAL := help
.PHONY: help setup quickstart train test test-faults test-slow test-browser lint format sweep dashboard lock audit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.installed ## make .venv from requirements.lock (does nothing when it is up to date)

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: $$($(PYTHON) --version 2>&1) does not fit, 3.11 to 3.13 does: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@# The installer first, with the hash it has in the lock file; then pip where uv cannot reach the package index.
	@awk '/^uv==/ {found = 1} found {print} found && !/\\$$/ {exit}' requirements.lock > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.txt
	@# Compiled here, or the first run of everything would do it, one file after the other.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock || \
		$(BIN)/python -m pip install --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --offline --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: setup ## train AlexNet on the embedded digits, within a minute on two CPU cores
	$(BIN)/python train.py experiment=quickstart
	@echo
	@echo "Next:"
	@echo "  $(BIN)/python train.py model=alexnet_lrn data=cifar10     CIFAR-10 (170 MB, downloaded once; or data.root=FOLDER)"
	@echo "  make sweep                                            LRN against BatchNorm, overlapping against not"
	@echo "  make dashboard                                        TensorBoard on all runs"

train: setup ## one run: make train ARGS="model=alexnet_bn data=cifar10"
	$(BIN)/python train.py $(ARGS)

sweep: setup ## every combination: make sweep ARGS="study=NAME model=alexnet_lrn,alexnet_bn seed=1,2,3"
	$(BIN)/python train.py -m $(or $(ARGS),model=alexnet_lrn$(comma)alexnet_bn model/pool=overlapping$(comma)non_overlapping)

comma := ,

dashboard: setup ## TensorBoard on runs/ and multirun/: make dashboard LOGDIR=… PORT=…
	@$(BIN)/python -m alexnet_pl tensorboard --port $(PORT) $(LOGDIR)

test: setup ## the tests, without network and without CIFAR-10
	$(BIN)/pytest $(ARGS)

test-faults: setup ## what can go wrong, with a table of what happens then: some minutes
	$(BIN)/pytest -m fault tests/faults $(ARGS)

test-slow: setup ## what compiles or times something: some minutes
	$(BIN)/pytest -m slow $(ARGS)

test-browser: setup ## pages in headless Chromium; installs Gradio and Playwright into .venv, as root Chromium too
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		{ echo "error: there is no Chromium. Install it, such as with: sudo apt-get install chromium"; exit 1; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[serve]' playwright
	$(BIN)/pytest -m browser $(ARGS)

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## resolve pyproject.toml anew into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header --upgrade --quiet -o requirements.lock

audit: setup ## known vulnerabilities in what requirements.lock pins (asks the package index)
	@report="$$($(BIN)/uv tool run pip-audit@2.10.1 --disable-pip --require-hashes --progress-spinner off -r requirements.lock 2>&1)"; \
	status=$$?; missed=$$(echo "$$report" | grep -c 'could not be audited'); \
	if echo "$$report" | grep -q '^Found .*known vulnerabilit'; then echo "$$report" | grep -v 'could not be audited'; exit 1; \
	elif [ $$status -ne 0 ]; then echo "the audit could not be done: $$(echo "$$report" | tail -n 1)"; \
	elif [ $$missed -gt 0 ]; then echo "the audit could not be done for $$missed packages: the index says nothing about them"; \
	else echo "no known vulnerabilities"; fi

clean: ## remove .venv and caches; runs/, multirun/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
