# Two commands: `make demo` and `make test`. Each sets up everything it needs, once. `make` alone
# says what there is, because everything else installs gigabytes first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OUT ?= out
# Versions known to fit together; `make test CONSTRAINTS=` tries the newest of everything.
CONSTRAINTS ?= -c tests/constraints.txt
# Of `make gate`: compile with this version instead of the environment's own.
TRITON ?=
BIN := $(VENV)/bin

# What limits torch, its two libraries and numpy to the instructions of the oldest x86-64 CPUs. MKL
# ignores MKL_ENABLE_INSTRUCTIONS on CPUs of AMD; MKL_CBWR acts on both.
OLDEST := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem \
	NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR"

.PHONY: help
help: ## this list
	@echo "make TARGET [ARGS=...] [VENV=$(VENV)] [OUT=$(OUT)] [CONSTRAINTS=]"
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

.PHONY: demo test portable lint bench clean plain library others interpreted parity traffic gate launches opcheck
.PHONY: emulate mutations counts results

demo: $(VENV)/.demo ## a small language model learns three tasks in a row; results in OUT/demo
	$(BIN)/moram demo --out $(OUT)/demo $(ARGS)

# Processes of their own, because Triton decides at its import whether it interprets kernels; and of
# about equal length, two at a time.
test: $(VENV)/.dev lint ## lint and every test: what CI runs
	$(MAKE) --no-print-directory -j2 -Otarget library others interpreted

# The processes as the oldest CPUs run them, which round otherwise than this one.
portable: $(VENV)/.dev ## every test, with the instructions of the oldest CPUs alone
	$(OLDEST) $(MAKE) --no-print-directory -j2 -Otarget library others interpreted

library: $(VENV)/.dev ## the tests of moram
	$(MAKE) --no-print-directory plain ARGS="tests/moram $(ARGS)"

others: $(VENV)/.dev ## the tests but those of moram and of interpreted kernels
	$(MAKE) --no-print-directory plain ARGS="tests --ignore tests/moram $(ARGS)"

plain: $(VENV)/.dev ## the tests but those of interpreted kernels; ARGS goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

interpreted: $(VENV)/.dev ## the tests of kernels, in Triton's interpreter
	$(INTERPRETED)

# The six checks of the kernels that need no GPU, one by one.
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interpreted

parity: $(VENV)/.dev ## of the interpreted tests: kernels and operator against a float64 oracle
	$(INTERPRETED)/test_interpreted_*.py tests/interpreted/test_shared_inputs.py

traffic: $(VENV)/.dev ## of the interpreted tests: bytes read and written, counted
	$(INTERPRETED)/test_traffic.py tests/interpreted/test_traffic_backward.py

# Every shipped configuration for every target; `make test` compiles a part of them. Another Triton
# lies beside the environment's own, whose torch has nothing to do there but to have shapes.
gate: $(VENV)/.dev $(TRITON:%=$(VENV)/triton-%) ## compile every configuration for every target; TRITON=3.6.0, ARGS=--update
	$(TRITON:%=PYTHONPATH=$(VENV)/triton-%) $(BIN)/python tests/compile_gate/gate.py $(ARGS)

$(VENV)/triton-%: $(VENV)/.dev
	$(BIN)/python -m pip install --no-deps --target $@ triton==$*

launches: $(VENV)/.dev ## of the interpreted tests: how many launches each path takes
	$(INTERPRETED)/test_launches.py

opcheck: $(VENV)/.dev ## of the interpreted tests: torch.library.opcheck, determinism
	$(INTERPRETED)/test_ops.py tests/interpreted/test_bits.py

# `make test` runs a cross-section of it, with the tests of the emulator.
emulate: $(VENV)/.dev ## run compiled kernels on the CPU, every case; ARGS goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emulated -m "" $(ARGS)

# Programs beside those tests.
TESTS := $(CURDIR)/tests
BESIDE := PYTHONPATH=$(CURDIR):$(TESTS):$(TESTS)/interpreted:$(TESTS)/compile_gate OMP_NUM_THREADS=1

mutations: $(VENV)/.dev ## break compiled kernels one place at a time; is it noticed?
	$(BESIDE) $(BIN)/python tests/emulated/mutations.py $(ARGS)

counts: $(VENV)/.dev ## count what compiled kernels execute, into tests/emulated/counts.csv
	$(BESIDE) $(BIN)/python tests/emulated/count_kernels.py $(ARGS)

lint: $(VENV)/.dev ## ruff check, ruff format --check, and the types of both packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev ## time the layers on this machine; ARGS goes to benchmarks/speed/throughput.py
	$(BIN)/python benchmarks/speed/throughput.py $(ARGS)

results: $(VENV)/.dev ## write the pages of results from benchmarks/results; ARGS=--check compares
	$(BIN)/python benchmarks/results_page.py $(ARGS)

$(VENV)/.demo: setup.py tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean: ## remove the environment, results and builds
	rm -rf $(VENV) $(OUT) build *.egg-info
