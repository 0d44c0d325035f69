# Two commands: `make demo` and `make test`. Each sets up everything it needs, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OUT ?= out
# Versions known to fit together; `make test CONSTRAINTS=` tries the newest of everything.
CONSTRAINTS ?= -c tests/constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/moram demo --out $(OUT)/demo $(ARGS)

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/throughput.py $(ARGS)

$(VENV)/.demo: setup.py tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
