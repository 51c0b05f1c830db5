# Every target sets itself up from nothing: Python 3.10+ and a C++ compiler are enough, a GPU is not needed.
#   make demo      train two small models on a corpus that needs no download, tune the cache, print one table
#   make test      every test, on as many processes as there are cores
#   make bench     time everything beside its competitors; ARGS="--quick" for the lines with a target alone
#   make reproduce RECIPE=ptb-lstm DATA=folder   train, finetune, tune the cache, write benchmarks/results/reproduction;
#                  interrupted, the same command goes on
#   make gpu       on a machine with a GPU, within nine minutes and without a network: build with the packages that are
#                  there, run every test marked gpu, the kernels under compute-sanitizer, then the benchmarks; ONLY="test"
#                  or ONLY="qrnn_pool lstm" runs a part, OUT=... is another folder for the results, ARGS="--device cpu"
#                  tries it out without a GPU
#   make sanitize  the tests of the kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
#   make lint      formatting and the rules that a grep can check
#   make clean     remove all that the other targets made
#
# PYTHON=python3.12      the interpreter the virtual environment is made from
# TORCH="torch==2.13.0"  the torch to build against and run on
# ARGS="-k lstm"         more arguments for the command that the target runs

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
ONLY ?=
OUT ?=
RECIPE ?=
DATA ?=

BUILD_TOOLS := "setuptools>=77" "cmake>=3.24" ninja pybind11
BIN := $(abspath $(VENV))/bin
# The tools of the environment come before those of the machine, for setup.py to find them.
IN_VENV := PATH="$(BIN):$$PATH"
STAMPS := $(VENV)/stamps
# Another TORCH is another stamp, so that changing it installs it and builds anew.
TORCH_STAMP := $(STAMPS)/torch-$(subst /,_,$(TORCH))
NATIVE := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.PHONY: demo test bench reproduce gpu sanitize lint clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/fastlm
	$(BIN)/fastlm demo $(ARGS)

# A file of tests has one process to itself: what it builds or trains once is there for all of it.
test: $(STAMPS)/fastlm
	$(IN_VENV) python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

bench: $(STAMPS)/bench
	$(BIN)/fastlm bench $(ARGS)

# At once, and not after the installation.
ifneq (,$(filter reproduce,$(MAKECMDGOALS)))
$(if $(and $(RECIPE),$(DATA)),,$(error make reproduce needs RECIPE=... and DATA=...))
endif

reproduce: $(STAMPS)/fastlm
	$(BIN)/fastlm reproduce --recipe "$(RECIPE)" --data "$(DATA)" --results benchmarks/results/reproduction $(ARGS)

gpu:
	$(PYTHON) benchmarks/gpu.py --only "$(ONLY)" $(if $(OUT),--out "$(OUT)") $(ARGS)

sanitize: $(STAMPS)/fastlm
	$(IN_VENV) python tests/sanitize/run.py $(ARGS)

lint: $(STAMPS)/pre-commit
	PRE_COMMIT_HOME="$(abspath $(VENV))/pre-commit" $(BIN)/pre-commit run --all-files --show-diff-on-failure

clean:
	rm -rf $(VENV) build dist *.egg-info fastlm/*.so fastlm/_build.json .pytest_cache .hypothesis .ruff_cache

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlm needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# First, and alone: nothing that comes later may choose another torch.
$(TORCH_STAMP): $(STAMPS)/venv
	$(BIN)/pip install "$(TORCH)"
	@rm -f $(STAMPS)/torch-* && touch "$@"

$(STAMPS)/build-tools: $(TORCH_STAMP)
	$(BIN)/pip install $(BUILD_TOOLS)
	@touch $@

$(STAMPS)/fastlm: $(STAMPS)/build-tools $(NATIVE)
	$(IN_VENV) pip install --no-build-isolation -e ".[plot,test]"
	@touch $@

# A competitor, which may be missing: the table says so.
$(STAMPS)/bench: $(STAMPS)/fastlm
	-$(BIN)/pip install tokenizers
	@touch $@

$(STAMPS)/pre-commit: $(STAMPS)/venv
	$(BIN)/pip install "pre-commit>=4"
	@touch $@
