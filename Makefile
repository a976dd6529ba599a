# `make help` lists the targets. Everything runs in .venv, which `make setup` creates from requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Tests run in one process per core and one more, which works while others wait; each has one thread.
PARALLEL := OMP_NUM_THREADS=1
PROCESSES := -n $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))') --dist loadfile
LOGDIR ?=
PORT ?= 6006

.DEFAULT_GOAL := help
.PHONY: help setup quickstart train sweep dashboard check lint types format test test-faults test-slow test-browser \
	test-trackers test-notebook test-lowest test-next docs notebook lock audit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.installed ## create .venv from requirements.lock (does nothing if it is up to date)

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: $$($(PYTHON) --version 2>&1) is not supported: expected 3.11 to 3.13. Run: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@# The installer comes first, with its hash from the lock file. pip takes over if uv cannot reach the package index.
	@awk '/^uv==/ {found = 1} found {print} found && !/\\$$/ {exit}' requirements.lock > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.txt
	@# Bytecode is compiled here in parallel. Otherwise the first run compiles every module one by one.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock || \
		$(BIN)/python -m pip install --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --offline --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: setup ## train a small AlexNet on scikit-learn's bundled digits: under a minute on 2 CPU cores
	$(BIN)/alexnet train experiment=quickstart
	@echo
	@echo "Next, after: source $(VENV)/bin/activate"
	@echo "  alexnet train model=alexnet_lrn data=cifar10    CIFAR-10 (170 MB, downloaded once; or data.root=DIR)"
	@echo "  alexnet --help                                  all commands"
	@echo "  make sweep                                      LRN against BatchNorm, overlapping against non-overlapping pooling"
	@echo "  make dashboard                                  TensorBoard on all runs"

train: setup ## train one network: make train ARGS="model=alexnet_bn data=cifar10"
	$(BIN)/alexnet train $(ARGS)

sweep: setup ## train every combination: make sweep ARGS="study=NAME model=alexnet_lrn,alexnet_bn seed=1,2,3"
	$(BIN)/alexnet train -m $(or $(ARGS),model=alexnet_lrn$(comma)alexnet_bn model/pool=overlapping$(comma)non_overlapping)

comma := ,

dashboard: setup ## start TensorBoard on runs/ and multirun/: make dashboard LOGDIR=DIR PORT=6007
	@$(BIN)/alexnet tensorboard --port $(PORT) $(LOGDIR)

check: lint types test ## lint, types and tests: what every change has to pass

lint: setup ## check style and format (ruff) and the order of the packages (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: setup ## check types (mypy)
	$(BIN)/mypy

format: setup ## format and auto-fix with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## run the tests in parallel; they need neither a network nor CIFAR-10
	$(PARALLEL) $(BIN)/pytest $(PROCESSES) $(ARGS)

test-faults: setup ## provoke faults (signals, full disks, corrupt files) and tabulate the outcomes: several minutes
	$(PARALLEL) $(BIN)/pytest $(PROCESSES) -m fault tests/faults $(ARGS)

test-slow: setup ## run the tests that compile, measure or train longer, in parallel: several minutes
	$(PARALLEL) $(BIN)/pytest $(PROCESSES) -m slow $(ARGS)

test-browser: setup ## test the web pages in headless Chromium; installs Gradio, Playwright and, as root, Chromium
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		{ echo "error: Chromium not found. Install it, for example: sudo apt-get install chromium"; exit 1; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[serve]' playwright
	$(PARALLEL) $(BIN)/pytest $(PROCESSES) -m browser $(ARGS)

test-trackers: setup ## test wandb (offline), MLflow (SQLite) and sharing with their own packages; installs them
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[wandb,mlflow,hub]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -m trackers $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/inference/test_hub.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/studies -k "report or ladder" $(ARGS)  # MLflow brings pyarrow, which pandas uses

test-lowest: setup ## run the security tests with the oldest supported dependencies (downloads an older PyTorch)
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(BIN)/uv venv --quiet --python $(BIN)/python "$$scratch/venv" && \
	$(BIN)/uv pip install --quiet --python "$$scratch/venv/bin/python" --resolution lowest-direct --editable '.[dev]' && \
	echo "oldest supported:" && $(BIN)/uv pip list --quiet --python "$$scratch/venv/bin/python" | \
		grep -E '^(torch|torchvision|lightning|hydra-core|omegaconf|filelock|fsspec|pillow) ' && \
	$(PARALLEL) "$$scratch/venv/bin/python" -m pytest $(PROCESSES) -m security -W ignore::DeprecationWarning $(ARGS)

test-next: setup ## run the tests of configs and studies with the release candidates of Hydra 1.4 and OmegaConf 2.4
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(BIN)/uv venv --quiet --python $(BIN)/python "$$scratch/venv" && \
	$(BIN)/uv pip install --quiet --python "$$scratch/venv/bin/python" --require-hashes -r requirements.lock && \
	$(BIN)/uv pip install --quiet --python "$$scratch/venv/bin/python" --prerelease allow 'hydra-core>=1.4.0rc3' \
		'omegaconf>=2.4.1rc1' 'hydra-joblib-launcher>=1.4.0rc3' 'hydra-submitit-launcher>=1.4.0rc3' && \
	PYTHONPATH="$$PWD" $(PARALLEL) "$$scratch/venv/bin/python" -m pytest $(PROCESSES) \
		tests/cli tests/config tests/studies tests/runtime/test_errors.py tests/test_api.py $(ARGS)

test-notebook: setup ## run docs/quickstart.py as a notebook; what it prints and draws is in build/quickstart.ipynb
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[notebook]'
	mkdir -p build
	cd build && ../$(BIN)/jupytext --quiet --to ipynb --execute --output quickstart.ipynb ../docs/quickstart.py

notebook: setup ## write docs/quickstart.ipynb, which Colab opens, from docs/quickstart.py
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[notebook]'
	$(BIN)/jupytext --quiet --update --to ipynb --output docs/quickstart.ipynb docs/quickstart.py

docs: setup ## build the documentation site into site/; fails on any warning, such as a broken link
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # not --quiet, which would silence the warnings that fail

lock: setup ## resolve pyproject.toml into requirements.lock, with the newest versions
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header --upgrade --quiet -o requirements.lock

audit: setup ## look up known vulnerabilities of the locked versions (asks the package index)
	@report="$$($(BIN)/uv tool run pip-audit@2.10.1 --disable-pip --require-hashes --progress-spinner off -r requirements.lock 2>&1)"; \
	status=$$?; missed=$$(echo "$$report" | grep -c 'could not be audited'); \
	if echo "$$report" | grep -q '^Found .*known vulnerabilit'; then echo "$$report" | grep -v 'could not be audited'; exit 1; \
	elif [ $$status -ne 0 ]; then echo "the audit failed: $$(echo "$$report" | tail -n 1)"; \
	elif [ $$missed -gt 0 ]; then echo "the audit is incomplete: the index has no data for $$missed packages"; \
	else echo "no known vulnerabilities"; fi

clean: ## remove .venv and caches; runs/, multirun/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
