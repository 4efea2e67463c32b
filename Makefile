# A convenience: README.md and CONTRIBUTING.md give the same as plain pip commands.
PYTHON ?= python3
BIN := .venv/bin
# Distributions of their own; an sdist of lorasmith is without them.
COMPANIONS := $(wildcard lorasmith-tiny lorasmith-editor)
PIP := $(BIN)/python -m pip install --quiet --no-compile
# Modules are compiled when they are first imported, and kept, as are the rewritten tests: empty means no.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all crash fuzz gpu site lint lint-pages collected clean

demo: .venv/installed
	$(BIN)/lorasmith demo
	@echo
	@echo "To type lorasmith in this terminal, first: source $(BIN)/activate"

# `make -j2 test` compiles what the tests import while mypy runs.
test: .venv/installed-dev lint collected
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The full products and the long runs as well.
test-all: .venv/installed-dev lint collected
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m ""

crash: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.crash --kills 200 --flips 100
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.data.crash_cache --kills 50 --flips 100
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.server.crash --kills 50
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cli.crash_together --kills 20

# Damaged files of every kind for an hour; cases that end badly are added to tests/fuzz/corpus.txt.
CASES ?= 100000
START ?= 0
fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(CASES) --start $(START) --minutes 60 --jobs 2

# GPU tests and benchmarks, on a machine that may have no network: docs/benchmarks.md says how. Without a GPU, a rehearsal.
MINUTES ?= 25
OUT ?= gpu-results
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --minutes $(MINUTES) --output $(OUT) \
	  $(if $(WHEELS),--wheels $(WHEELS)) $(if $(PARTS),--parts $(PARTS)) \
	  $(if $(COMFYUI),--comfyui $(COMFYUI)) $(if $(SD_SCRIPTS),--sd-scripts $(SD_SCRIPTS))

# The documentation as pages in build/site, in an environment of its own: the generator is no dependency of the tests.
site: build/site-env/installed
	build/site-env/bin/python -m tools.site

build/site-env/installed: pyproject.toml
	$(PYTHON) -m venv build/site-env
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["docs"], sep="\n")' \
	  > build/site-env/docs.txt
	build/site-env/bin/python -m pip install --quiet --requirement build/site-env/docs.txt
	touch $@

lint: .venv/installed-dev lint-pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The modules of the page. Skipped where there is no npm, but not in continuous integration.
PAGES := tools/pages/node_modules
ifeq ($(shell command -v npm)$(CI),)
lint-pages:
	@echo "The modules of the page are not checked: there is no npm."
else
lint-pages: $(PAGES)/installed
	$(PAGES)/.bin/biome format --config-path=tools/pages src/lorasmith/server/pages
	$(PAGES)/.bin/tsc --project tools/pages
endif

$(PAGES)/installed: tools/pages/package-lock.json
	cd tools/pages && npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

# Once, instead of in each of the tests' processes at the same time.
collected: .venv/installed-dev
	$(BIN)/python -m pytest -q --collect-only > /dev/null

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(BIN)/python src/lorasmith/cli/torch_builds.py --save-download

.venv/installed: $(wildcard pyproject.toml lorasmith-*/pyproject.toml) | .venv/bin/python
	@echo "Installing torch and other packages: up to 4 GB to download, and minutes without output."
	$(PIP) --editable ".[models,heic,likeness]" $(COMPANIONS:%=--editable ./%)
	touch $@

.venv/installed-dev: $(wildcard pyproject.toml lorasmith-*/pyproject.toml) | .venv/bin/python
	@echo "Installing torch and other packages: up to 4 GB to download, and minutes without output."
	$(PIP) --editable ".[dev]" $(COMPANIONS:%=--editable ./%)
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis $(PAGES)
