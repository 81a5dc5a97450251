# The suite's commands. STACK=… selects another file of constraints/, with a virtual environment of its own;
# PYTHON=… the interpreter that a new environment is made with; ARGS=… goes to pytest (or to kvcycle) as it is.
DEFAULT_STACK := sglang-jax-0.1.0rc0
STACK ?= $(DEFAULT_STACK)
ARGS ?=
CYCLES ?= 1000
WORKERS ?= 2

VENV := $(if $(filter $(DEFAULT_STACK),$(STACK)),.venv,.venv-$(STACK))
PINS := constraints/$(STACK).txt
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# sglang-jax answers a crash with SIGQUIT to its parent, which would be make: the guard takes it and keeps the exit code.
PYTEST := $(BIN)/python scripts/guard.py $(BIN)/pytest

.DEFAULT_GOAL := help
.PHONY: help demo replay faults soak bench test matrix mutants lint format constraints clean FORCE

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  STACK=$(STACK) (one of: $(basename $(notdir $(wildcard constraints/*.txt))))"
	@echo "  PYTHON=/path/to/python3.13 for the interpreter of a new environment; ARGS=… for pytest"

demo: $(STAMP) ## Run the hardware suite on the real engine, tiny model, virtual CPU devices
	$(PYTEST) -m tpu --kv-platform cpu --kv-profile tiny tests/tpu $(ARGS)

replay: $(STAMP) ## Run the cycle at full size (Qwen2.5-3B, dummy weights, 17 GiB) and compare with the reference
	$(BIN)/python scripts/guard.py $(BIN)/kvcycle replay $(ARGS)

faults: $(STAMP) ## Plant every fault into a live engine and see each caught by its check
	$(BIN)/python scripts/guard.py $(BIN)/kvcycle faults $(ARGS)

soak: $(STAMP) ## Run CYCLES=1000 cycles on one engine (tiny model, virtual CPU devices): nothing may grow or compile
	$(BIN)/python scripts/guard.py $(BIN)/kvcycle soak --cycles $(CYCLES) $(ARGS)

bench: $(STAMP) ## Measure the rebuild, and what the suite costs, as ratios (5 to 10 minutes; keep the machine quiet)
	$(BIN)/python scripts/guard.py $(BIN)/python -m benchmarks $(ARGS)

# A worker's own threads would have a heap each, of which the end cannot be given back (see platform.py). Bytecode is
# written, whatever the environment says: a hundred processes would otherwise compile the same modules.
test: lint ## Lint, check types and run every test that needs no TPU
	MALLOC_ARENA_MAX=1 PYTHONDONTWRITEBYTECODE= $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not tpu and not long" --junitxml=reports/tests$(VENV:.venv%=%)/junit.xml $(ARGS)

matrix: $(STAMP) ## Boot an engine for every cell of docs/compatibility.md at engine level: some minutes
	$(PYTEST) -m "long and not tpu" $(ARGS)

mutants: $(STAMP) ## Test the tests: the share of small faults in checks, ledger and record that they notice
	$(BIN)/python scripts/mutants.py

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## Mend style and formatting in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints: ## Resolve STACK anew on Python 3.12 and 3.13 and write its constraints file
	@python="$$(scripts/find-python.sh)" && "$$python" scripts/constraints.py "$(STACK)"

clean: ## Remove the virtual environments and caches; what runs wrote to reports/ stays
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks mutants build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment serves only while its python runs, and only in the folder it was made in: its scripts name that folder.
MADE_IN := $(shell $(BIN)/python -c 'print(open("$(VENV)/.made-in").read().strip())' 2>/dev/null)
ifneq ($(MADE_IN),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): pyproject.toml $(PINS) Makefile
	@scripts/bootstrap.sh "$(VENV)" "$(PINS)"
	@touch $@

# Reached only when the file is not there.
constraints/%.txt:
	@echo "There is no $@. STACK may be one of: $(basename $(notdir $(wildcard constraints/*.txt)));" \
		"'make constraints STACK=$*' makes another." >&2; exit 1
