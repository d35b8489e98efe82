# Set-up, runs and checks. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed
LLAMA := $(VENV)/.llama-installed
LLAMA_VERSION := $(shell sed -n 's/^llama-cpp-python==//p' constraints.txt)
LLAMA_DIR := $(VENV)/llama/$(LLAMA_VERSION)
LLAMA_SOURCE := $(LLAMA_DIR)/llama_cpp_python-$(LLAMA_VERSION)
LLAMA_FLAGS := -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG' -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF \
  -DSKBUILD_PLATLIB_DIR=unused
PEERS := $(VENV)/peers/.installed
# Tests of one file share what takes long to make, so a file stays in one process.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile
UV_VERSION := 0.13.9

# uv does not read pip's list of local wheel folders: hand it over where it is set.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
endif
# DeepSpeed compiles its kernels when they are first used, not at installation.
export DS_BUILD_OPS := 0

.PHONY: help setup prototype production test test-all test-slow check format bench docs llama cloud test-cloud test-aws test-gcp clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with all packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "ULTRATHINK needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name one: make setup PYTHON=python3.11"; exit 1; }
	@echo "[setup 1/3] a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[setup 2/3] the installer"
	@$(BIN)/pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	@echo "[setup 3/3] about 200 packages (1 to 5 minutes when nothing is cached)"
	@$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[deepspeed,cleaning,multimodal,evaluation,export,serve,kubernetes,dev]'
	@touch $@
	@echo "Ready: $(BIN)/python run.py --help"

prototype: $(STAMP) ## set up, then data -> training -> evaluation -> export -> report, in minutes
	$(BIN)/python run.py --workflow prototype

production: $(STAMP) ## set up, then baseline -> experts and reasoning -> RLHF -> evaluation -> export
	$(BIN)/python run.py --workflow production

test: $(STAMP) ## set up, then the tests (under 15 minutes)
	$(PYTEST)

test-all: $(STAMP) ## the slow tests too
	$(PYTEST) -m 'slow or not slow'

test-slow: $(STAMP) ## the slow tests alone
	$(PYTEST) -m slow --durations=15

check: $(STAMP) ## lint, format, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## mend format and what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PEERS) ## measurements against peers, as ratios
	@for file in $(wildcard benchmarks/*.py); do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

$(PEERS): $(STAMP) benchmarks/peers.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(VENV)/peers --no-deps -r benchmarks/peers.txt
	@touch $@

docs: $(DOCS) ## write docs/configuration.md from the config models, and build the site into site/
	$(BIN)/python -m ultrathink_model.config.describe > docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(DOCS): $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	@touch $@

llama: $(LLAMA) ## compile llama.cpp, which then checks GGUF exports and runs them in the tests (minutes)

# The package for Python comes without its library: of its sources only that is compiled, without images, sound, servers
# and tools, and without the slow passes of the compiler, for its own code only lays graphs out.
$(LLAMA): $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt cmake diskcache ninja
	@$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_DIR) llama-cpp-python==$(LLAMA_VERSION)
	@tar -xzf $(LLAMA_SOURCE).tar.gz -C $(LLAMA_DIR)
	@$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S $(LLAMA_SOURCE) \
	  -B $(LLAMA_DIR)/build $(LLAMA_FLAGS) > $(LLAMA_DIR)/log
	@$(BIN)/cmake --build $(LLAMA_DIR)/build --target llama >> $(LLAMA_DIR)/log || { tail -40 $(LLAMA_DIR)/log; exit 1; }
	@CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/pip install --quiet --no-deps --no-cache-dir $(LLAMA_SOURCE).tar.gz
	@lib="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llama_cpp/lib" && \
	  mkdir -p "$$lib" && cp -P $(LLAMA_DIR)/build/bin/*.so* "$$lib"
	@$(BIN)/python -c 'import llama_cpp'
	@touch $@

cloud: $(VENV)/aws/.installed $(VENV)/gcp/.installed ## make .venv/aws and .venv/gcp, for SageMaker and Vertex AI

# The clouds' packages hold others back, so that the locked versions of the default set-up do not go with them.
$(VENV)/%/.installed: $(STAMP) constraints-%.txt
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)/$*
	@$(BIN)/uv pip install --quiet --python $(VENV)/$*/bin/python --constraint constraints-$*.txt --editable '.[$*,cloud-test]'
	@touch $@

test-cloud: test-aws test-gcp ## the production workflow through SageMaker and Vertex AI, on loopback (slow; -j2: both at once)

test-aws: $(VENV)/aws/.installed
	$(VENV)/aws/bin/python -m pytest -m 'slow or not slow' tests/cloud/test_sagemaker.py tests/cloud/test_manifests.py

test-gcp: $(VENV)/gcp/.installed
	$(VENV)/gcp/bin/python -m pytest -m 'slow or not slow' tests/cloud/test_vertex.py tests/cloud/test_vertex_pipeline.py

clean: ## remove what the checks and the build left (outputs stay)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
