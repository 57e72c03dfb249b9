# `make help` lists the targets. Everything is installed into one virtual environment, $(VENV).
#
#   PYTHON   the interpreter the environment is made with (3.10 or newer)
#   TORCH    what is installed where PYTHON has no torch of its own, as arguments of pip
#   ARGS     further arguments for pytest (make test) or for the example (make demo)
#   TESTS    what make test and test-all run, such as TESTS=tests/test_methods.py
#   EXPERIMENTS  what make bench-quality runs: names in benchmarks/experiments, or all
#   WORKERS  how many processes they use; 0 runs the tests in one process, as a debugger needs

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
VENV    ?= .venv
TESTS   ?= tests
ARGS    ?=
WORKERS ?= 2

# The oldest Python and torch that setup.cfg accepts.
MIN_PYTHON := 3, 10
MIN_TORCH  := 2, 6

BIN := $(VENV)/bin
# Python compiles what it imports, and keeps it, which some containers tell it not to. pip would compile everything, for
# a minute or more, of which most is never used.
PIP_INSTALL := $(BIN)/python -m pip install --no-compile
unexport PYTHONDONTWRITEBYTECODE

# An environment that somebody made by hand, or that VENV= names by mistake, is never removed.
CHECK_OURS = if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/.made-by-make" ]; then \
    echo "error: $(VENV) exists and was not made by this Makefile; remove it or name another: make VENV=.venv-dlqat" >&2; \
    exit 1; fi

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The targets share one environment, and two pips must not write to it at once.
.NOTPARALLEL:
.PHONY: help demo docs test test-all coverage test-engines quality bench-quality clean

help:
	@echo "make demo     fine-tune a small model with DL-QAT on this machine (ARGS= goes to examples/finetune.py)"
	@echo "make docs     build the documentation as a site, in outputs/site"
	@echo "make test     run the tests, minutes (TESTS= chooses which, ARGS= goes to pytest, WORKERS= sets the processes)"
	@echo "make test-all  the same with those marked slow: every combination of settings, runs of several processes"
	@echo "make coverage  make test-all, and which branches of src it never takes; twice as long, fails below 95 %"
	@echo "make test-engines  exported models in gptqmodel, built into an environment of its own"
	@echo "make quality  ruff, mypy and the tests of the code's structure and documentation"
	@echo "make bench-quality  every method and peer on the same work; hours (EXPERIMENTS=all for all of them, ARGS= goes to benchmarks/run.py)"
	@echo "make clean    remove $(VENV), caches and build files; outputs/ stays"
	@echo "PYTHON=...    the interpreter to use; if it has torch, that torch is used, else $(TORCH) is installed"

demo: $(VENV)/.stamp-demo
	$(BIN)/python examples/finetune.py --demo $(ARGS)

# -W: a warning, such as of a link that leads nowhere, is an error. -E: pages that have not changed are read again.
docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx -q -W --keep-going -E docs outputs/site
	@echo "outputs/site/index.html"

# One thread a worker: the default, one a core in each worker, makes the workers fight over the cores.
# Offline: no test may depend on a download. loadgroup: tests that share what is dear to make run in one worker.
test: MARKS = -m "not slow"
test test-all: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(MARKS) $(TESTS) $(ARGS)

# Not a part of test-all: a trace of every call doubles the time.
coverage: $(VENV)/.stamp-coverage
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist loadgroup $(TESTS) $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# gptqmodel takes minutes to build, and wants another torch: not part of `make test`.
ENGINES ?= gptq
# It asks for a torch with CUDA; what else it needs is named, and its own list left out.
ENGINE_PACKAGES_gptq = accelerate device-smi dill logbar maturin pillow protobuf tokenicer safetensors threadpoolctl \
    torchao pypcre defuser setuptools wheel
ENGINE_NO_DEPS_gptq = gptqmodel

test-engines: $(addprefix .engine-,$(ENGINES))

.PHONY: $(addprefix .engine-,$(ENGINES))
$(addprefix .engine-,$(ENGINES)): .engine-%: $(VENV)-%/.stamp
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)-$*/bin/python -m pytest -q tests/formats/test_engines.py -k $* $(ARGS)

$(VENV)-%/.stamp: setup.cfg
	rm -rf "$(VENV)-$*"
	$(PYTHON) -m venv "$(VENV)-$*"
	$(VENV)-$*/bin/python -m pip install $(TORCH)
	$(VENV)-$*/bin/python -m pip install -e . pytest $(ENGINE_PACKAGES_$*)
	$(if $(ENGINE_NO_DEPS_$*),$(VENV)-$*/bin/python -m pip install --no-deps --no-build-isolation $(ENGINE_NO_DEPS_$*))
	@touch $@

quality: $(VENV)/.stamp-quality
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy src
	$(BIN)/python -m pytest -q tests/quality

# On the embedded model and text that it makes up; ARGS="--model ... --tokens ..." for another.
EXPERIMENTS ?= small
bench-quality: $(VENV)/.stamp-bench
	for file in $(patsubst %,benchmarks/experiments/%.json,$(if $(filter all,$(EXPERIMENTS)),*,$(EXPERIMENTS))); do \
	    $(BIN)/python benchmarks/run.py $$file $(ARGS) || exit 1; done
	$(BIN)/python benchmarks/run.py benchmarks/experiments/small.json --step_times $(ARGS)

# outputs/ stays: it may hold trained adapters.
clean:
	@$(CHECK_OURS)
	rm -rf "$(VENV)" build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +

# A stamp is the last thing a recipe writes, so an interrupted recipe leaves none and is run again.
# The environment is begun anew in that case, because half an environment cannot be told from a whole one.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(MIN_PYTHON)))' || { \
	    echo "error: PYTHON=$(PYTHON) is missing or older than 3.10; name another: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "error: PYTHON=$(PYTHON) cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
	    echo "       On Debian and Ubuntu: apt install python3-venv. Or name another: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@$(CHECK_OURS)
	rm -rf "$(VENV)"
	@mkdir -p "$(VENV)" && touch "$(VENV)/.made-by-make"
	@set -e; \
	where=$$($(PYTHON) -W ignore -c "$$FIND_TORCH"); \
	if [ -n "$$where" ]; then \
	    echo "using the torch of $(PYTHON), in $$where"; \
	    $(PYTHON) -m venv --system-site-packages "$(VENV)"; \
	    if [ -z "$$($(BIN)/python -W ignore -c "$$FIND_TORCH")" ]; then \
	        $(BIN)/python -c "$$ADD_PATH" "$$where"; \
	    fi; \
	else \
	    echo "$(PYTHON) has no torch this package can use: installing $(TORCH)"; \
	    $(PYTHON) -m venv "$(VENV)"; \
	    $(PIP_INSTALL) $(TORCH); \
	fi
	@$(BIN)/python -W ignore -c 'import torch; print("torch", torch.__version__)'
	@touch $@

# Installing into a whole environment can be repeated, so a change of setup.cfg only installs again. pip is held to
# the torch that is there: a requirement which that torch does not meet is an error, not a download of another build.
$(VENV)/.stamp-%: $(VENV)/.stamp-venv setup.cfg pyproject.toml
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	$(PIP_INSTALL) -c $(VENV)/constraints.txt -e ".[$*]"
	@touch $@

# Prints the folder that torch is imported from, or nothing where there is none or one too old.
define FIND_TORCH
try:
    import os, torch
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= ($(MIN_TORCH)):
        print(os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__))))
except Exception:
    pass
endef
export FIND_TORCH

# Makes a folder importable in the new environment. --system-site-packages leads to the interpreter behind PYTHON;
# where PYTHON is itself in a virtual environment, its torch is not there.
define ADD_PATH
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "torch_of_parent.pth").write_text(sys.argv[1] + "\n")
endef
export ADD_PATH
