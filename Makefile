# `make help` lists what there is. Every target works in a clean clone: it makes its own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1 torchvision==0.29.1

PY      := $(VENV)/bin/python
SOURCES := pyproject.toml $(wildcard setup.py MANIFEST.in csrc/*)

.DEFAULT_GOAL := help
.PHONY: help example example-xray test test-all test-processors sanitize sanitize-threads tidy coverage bench bench-quick bench-gpu lint docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# PyTorch first and pinned: these are the versions that the tests run with.
$(VENV)/.torch:
	@echo "make: installing PyTorch into $(VENV) (about 5 GB on the disk, some minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet $(TORCH) || \
	  { echo "make: no $(TORCH) here; taking the newest release"; $(PY) -m pip install --quiet torch torchvision; }
	@touch $@

# The stamps depend on the C++ sources, so that a changed kernel is rebuilt. An editable install by path is found from
# every folder, also from the one that the clone lies in, where a folder named otloss would hide any other.
INSTALL = @echo "make: building otloss and installing what it needs (some minutes)"; \
	$(PY) -m pip install --quiet --config-settings editable_mode=compat -e

$(VENV)/.examples: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[examples]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[dev,examples]"
	@touch $@ $(VENV)/.examples

$(VENV)/.docs: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[docs,examples]"
	@touch $@

# For .ci/run: everything in one go, which builds the kernels once.
$(VENV)/.all: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[dev,docs,examples]"
	@touch $@ $(VENV)/.dev $(VENV)/.docs $(VENV)/.examples

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(INSTALL) ".[bench]"
	@touch $@

example: $(VENV)/.examples  ## every stage of OPTiML on generated images, from pretraining to the report (some minutes)
	$(PY) -m examples.optiml example

example-xray: $(VENV)/.examples  ## the same on a prepared data set: make example-xray DATA=folder [XRAY_ARGS="--epochs 20"]
	@test -n "$(DATA)" || { echo "make: say which prepared data set, e.g. make example-xray DATA=data/nih"; exit 2; }
	$(PY) -m examples.optiml xray --data "$(DATA)" $(XRAY_ARGS)

# Up to four processes, one per core, since most tests run on one thread; one that has no more takes from another.
test: $(VENV)/.dev  ## run every test and every docstring's example
	$(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-all: export OTLOSS_EVERY_CASE = 1
test-all: test  ## the same with every case of the long grids, of which test takes a part in which all pairs meet

# Arguments go to the script, which gives pytest what is not its own: make test-processors PROCESSORS_ARGS="--only avx2".
test-processors: $(VENV)/.dev  ## the tests that compute, as on older processors and with more threads (15 minutes)
	$(PY) tests/processors.py $(PROCESSORS_ARGS)

# The kernels without Python in a program of random calls, at every level that the processor has: needs only a compiler.
# SANITIZE_ARGS="SEED SECONDS" repeats a run, or makes it longer.
SANITIZED := $(filter-out csrc/module.cpp,$(wildcard csrc/*.cpp)) tests/sanitize/driver.cpp
comma := ,
SANITIZE = mkdir -p build/$@; set -e; \
	for file in $(SANITIZED); do echo $$file; done | xargs -P 2 -I {} sh -c '$(CXX) -std=c++17 -O1 -g1 -fno-omit-frame-pointer \
	  -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -fno-sanitize-recover=all -fsanitize=$(1) -pthread \
	  -c {} -o build/$@/$$(basename {}).o'; \
	$(CXX) -fsanitize=$(1) -pthread $(foreach file,$(SANITIZED),build/$@/$(notdir $(file)).o) -o build/$@/driver; \
	for level in baseline v3 v4; do OTLOSS_CPU_LEVEL=$$level build/$@/driver $(SANITIZE_ARGS); done

sanitize:  ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (3 minutes)
	@$(call SANITIZE,address$(comma)undefined)

sanitize-threads: export TSAN_OPTIONS = die_after_fork=0 halt_on_error=1
sanitize-threads:  ## the CPU kernels under ThreadSanitizer (3 minutes)
	@$(call SANITIZE,thread)

# The headers of Python and pybind11 count as the system's: only what is in csrc/ is looked at.
TIDY_FLAGS = -std=c++17 -Wno-psabi -isystem $$($(PY) -c "import sysconfig; print(sysconfig.get_path('include'))") \
	-isystem $$($(PY) -c "import pybind11; print(pybind11.get_include())")
tidy: $(VENV)/.dev  ## clang-tidy over csrc/, with the checks of .clang-tidy; warnings are errors (5 minutes)
	@$(PY) -m pip install --quiet clang-tidy
	ls csrc/*.cpp | xargs -P 2 -I {} $(VENV)/bin/clang-tidy --quiet {} -- $(TIDY_FLAGS)

coverage: $(VENV)/.dev  ## the lines of otloss and csrc that the tests do not reach: a page in benchmarks/results (15 minutes)
	$(PY) tests/uncovered.py $(COVERAGE_ARGS)

bench: $(VENV)/.bench  ## time otloss and its peers, draw the plots, write the README's table (more than an hour)
	$(PY) -m benchmarks all $(BENCH_ARGS)

bench-quick: $(VENV)/.bench  ## the main rows of that with few peers (3 minutes)
	$(PY) -m benchmarks quick $(BENCH_ARGS)

bench-gpu: $(VENV)/.dev  ## check and time otloss on a CUDA device, in stages; rehearses the first where there is none
	@$(PY) -m pip install --quiet flash-sinkhorn || echo "make: flash-sinkhorn is not available here"
	$(PY) -m benchmarks.gpu $(BENCH_ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(VENV)/.docs  ## the documentation site, in build/docs; runs the recipes (1 minute)
	$(PY) -m sphinx -c docs -W --keep-going -q -b html . build/docs
	@echo "make: open build/docs/docs/index.html"

clean:  ## remove what was built; environments and results stay
	rm -rf build dist wheelhouse *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find otloss -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.dev $(VENV)/.examples $(VENV)/.bench $(VENV)/.docs
