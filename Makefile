# Everything a contributor or a first-time user does. Needs Python 3.11 or newer and make; prepares the rest itself.
#
#   make run PYTHON=python3.12        another Python          make run ARGS="--port 9000"   options for the server
#   make test ARGS="-k scheduler"     options for pytest      make run PIP_ARGS="..."       options for pip

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
# A stamp is the time of the last successful install of one set of extras: nothing is installed while it is newest.
RUN_READY := $(VENV)/.ready-run
TEST_READY := $(VENV)/.ready-test
LINT_READY := $(VENV)/.ready-lint
CPU_BENCHMARKS := $(filter-out %_gpu.py,$(wildcard benchmarks/[a-z]*.py))

define PYTHON_CHECK
import sys
if sys.version_info < (3, 11):
    sys.exit("autobot_llm needs Python 3.11 or newer, and '$(PYTHON)' is %d.%d. Name another one: make PYTHON=python3.12"
             % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv")
endef
export PYTHON_CHECK

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-gpu lint bench clean

help:
	@echo "make run       install, and start the server with the embedded model on 127.0.0.1:8100"
	@echo "make test      install what tests need, and run them (no GPU needed)"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make bench     the benchmarks that run on a CPU; each ends with one JSON line"
	@echo "make clean     remove the environment, caches and build output"

run: $(RUN_READY)
	@exec $(BIN)/autobot-llm serve $(ARGS)

test: $(TEST_READY)
	$(BIN)/python -m pytest -q $(ARGS)

test-gpu: $(TEST_READY)
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

lint: $(LINT_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(TEST_READY)
	@test -n "$(CPU_BENCHMARKS)" || { echo "there is no CPU benchmark in benchmarks/" >&2; exit 1; }
	@set -e; for benchmark in $(CPU_BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python "$$benchmark" $(ARGS); done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@test ! -f $(VENV)/pyvenv.cfg || { echo "rm -rf $(VENV)"; rm -rf $(VENV); }

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "there is no '$(PYTHON)' here: install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$PYTHON_CHECK"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN_READY): EXTRAS = engine
$(TEST_READY): EXTRAS = test
$(LINT_READY): EXTRAS = engine,lint
$(RUN_READY) $(TEST_READY) $(LINT_READY): pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing autobot_llm[$(EXTRAS)] into $(VENV): a few minutes the first time, torch is large."
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
