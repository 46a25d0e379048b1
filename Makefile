# Everything a contributor or a first-time user does. Needs Python 3.11 or newer and make; prepares the rest itself.
#
#   make run PYTHON=python3.12        another Python          make run ARGS="--port 9000"   options for the server
#   make test ARGS="-k scheduler"     options for pytest      make run PIP_ARGS="..."       options for pip
#   make bench-gpu MODELS=/dev/shm    where the two 7B model folders (28 GB) are, or are made

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
MODELS ?= build/models

BIN := $(VENV)/bin
# A stamp is the time of the last successful install of one set of extras: nothing is installed while it is newest.
RUN_READY := $(VENV)/.ready-run
TEST_READY := $(VENV)/.ready-test
LINT_READY := $(VENV)/.ready-lint
# A benchmark for the CPU is a program of benchmarks/ named after what it measures; the others make models or need a GPU.
CPU_BENCHMARKS := $(filter-out %_gpu.py,$(wildcard benchmarks/engine_*.py))
EMBEDDED_MODEL := src/autobot_llm/assets/tiny
RANDOM_MODEL := $(MODELS)/mistral-7b-random
WIDENED_MODEL := $(MODELS)/mistral-7b-widened

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

# Tests of the shared cache want a real redis-server. Where root can install one it is installed, else they are skipped
# and say why; in CI (CI=true) they fail.
define GET_REDIS
command -v redis-server >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
    echo "Installing redis-server for the tests." >&2; \
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends redis-server; \
} >/dev/null || echo "redis-server could not be installed" >&2
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-gpu lint bench bench-gateway bench-gpu clean

help:
	@echo "make run       install, and start the server with the embedded model on 127.0.0.1:8100"
	@echo "make test      install what tests need, and run them (no GPU needed)"
	@echo "make test-gpu  the tests that need a CUDA device, and the kernels' tests on it"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make bench     the benchmarks that run on a CPU; each ends with one JSON line"
	@echo "make bench-gateway  what the server costs in front of another one, beside LiteLLM's (installed into build/)"
	@echo "make bench-gpu the engine at 7B size on a GPU; makes two models of 14 GB first, if they are not there"
	@echo "make clean     remove the environment, caches and build output"

run: $(RUN_READY)
	@exec $(BIN)/autobot-llm serve $(ARGS)

test: $(TEST_READY)
	@$(GET_REDIS)
	$(BIN)/python -m pytest -q $(ARGS)

test-gpu: $(TEST_READY)
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { \
	    echo "make test-gpu needs a CUDA device that torch can use" >&2; exit 1; }
	$(BIN)/python -m pytest -q -m "gpu or not gpu" tests/gpu tests/kernels $(ARGS)

lint: $(LINT_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(TEST_READY)
	@test -n "$(CPU_BENCHMARKS)" || { echo "there is no CPU benchmark in benchmarks/" >&2; exit 1; }
	@set -e; for benchmark in $(CPU_BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python "$$benchmark" $(ARGS); done

bench-gateway: $(TEST_READY)
	$(BIN)/python benchmarks/gateway.py $(ARGS)

bench-gpu: $(TEST_READY) | $(RANDOM_MODEL) $(WIDENED_MODEL)
	$(BIN)/python benchmarks/engine_gpu.py --random $(RANDOM_MODEL) --widened $(WIDENED_MODEL) $(ARGS)

$(RANDOM_MODEL): | $(TEST_READY)
	$(BIN)/python benchmarks/random_model.py $@ --shape mistral-7b --vocab 32000

$(WIDENED_MODEL): | $(TEST_READY)
	$(BIN)/python benchmarks/widen.py $(EMBEDDED_MODEL) $@ --shape mistral-7b

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
$(LINT_READY): EXTRAS = engine,redis,lint
$(RUN_READY) $(TEST_READY) $(LINT_READY): pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing autobot_llm[$(EXTRAS)] into $(VENV): a few minutes the first time, torch is large."
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
