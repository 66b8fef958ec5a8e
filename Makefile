# The README's two commands are `make demo` and `make test`. Each sets up what it needs in .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := torchrl_sglang_hidden tests benchmarks tools tutorials docs
# By files, so that the fixtures of a file are made once.
NO_SERVER := -m "not engine" -n 2 --dist loadfile
# Where the time goes, at the end of what each prints.
FAST := $(BIN)/python -m pytest $(NO_SERVER) --durations=40
# By files and servers, in the order that tests/conftest.py gives them.
ENGINE := $(BIN)/python -m pytest -m engine -n 2 --dist loadgroup --no-loadscope-reorder --durations=60
# For `make compat`: packages with the versions to try, as for pip, and the tests to run with them.
COMPAT := .compat
WITH ?= torchrl tensordict
# For `make kills`.
KILLS ?= 20
TESTS ?= $(NO_SERVER)
# For `make fuzz`: targets by name, and options of tools/fuzz.py.
FUZZ ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test fast soak images kills compat fuzz bench load tutorials lint docs audit check format clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(INSTALLED) ## set up .venv: SGLang, PyTorch and the rest, about 11 GB

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; make PYTHON=python3.11 install"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## a real model in a real SGLang server, driven by a TorchRL collector
	$(BIN)/torchrl-sglang-hidden demo

test: $(INSTALLED) ## every test, those with a real server included
	$(FAST)
	$(ENGINE)

fast: $(INSTALLED) ## the tests that need no server
	$(FAST)

soak: export TORCHRL_SGLANG_HIDDEN_FAULT_ROUNDS ?= 20
soak: export TORCHRL_SGLANG_HIDDEN_STORM_FAULTS ?= 10
soak: $(INSTALLED) ## every fault twenty times at random moments, about 45 minutes; tests/README.md says how to repeat a run
	$(BIN)/python -m pytest -m engine -n 0 -s tests/engine/test_faults_engine.py tests/engine/test_storm_engine.py

images: $(INSTALLED) ## the tests of images on models that `make test` leaves out: Qwen2-VL
	TORCHRL_SGLANG_HIDDEN_IMAGE_MODELS=all $(BIN)/python -m pytest -n 0 -k qwen2_vl $(wildcard tests/engine/test_image*_engine.py)

kills: $(INSTALLED) ## a rollout whose server is killed KILLS=20 times at random moments, about 15 minutes
	TORCHRL_SGLANG_HIDDEN_KILLS=$(KILLS) $(BIN)/python -m pytest -n 0 -s -o timeout=3600 tests/engine/test_started_without_weights.py -k deaths

# For example: make compat WITH="torchrl-nightly tensordict-nightly" TESTS="-m engine -n 0 tests/engine/test_grpo.py"
compat: $(INSTALLED) ## the fast tests with the newest TorchRL and TensorDict; WITH= and TESTS= choose others
	$(BIN)/python tools/second_environment.py $(COMPAT) $(WITH)
	$(COMPAT)/bin/python -m pytest $(TESTS)

# For example: make fuzz FUZZ="answer recording --runs 1000000"
fuzz: $(INSTALLED) ## a million broken and hostile answers, requests and files; FUZZ= chooses others
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[fuzz]'
	$(BIN)/python tools/fuzz.py $(FUZZ)

bench: $(INSTALLED) ## the speed table: against stock SGLang, TorchRL and Hugging Face, about 15 minutes
	$(BIN)/python benchmarks/speed_table.py --write

load: $(INSTALLED) ## many callers of one server, about 15 minutes: right answers, and nothing that grows
	$(BIN)/python benchmarks/soak.py --write

tutorials: $(INSTALLED) ## execute every lesson, and keep what it shows
	$(BIN)/python tools/execute_lessons.py

lint: $(INSTALLED) ## ruff, format, mypy --strict
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

docs: $(INSTALLED) ## the documentation site, in docs/_build; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

audit: $(INSTALLED) ## known vulnerabilities of what is installed; says so where the database cannot be asked
	$(BIN)/python tools/audit.py

check: lint fast docs audit ## lint, fast, docs and audit: green on every commit

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean: ## remove everything that can be made again
	rm -rf $(VENV) $(COMPAT) demo_output docs/_build .pytest_cache .mypy_cache .ruff_cache
