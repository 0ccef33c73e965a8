# One environment, made on first use. `make test VENV=.venv50 TRANSFORMERS='transformers==5.0.0'` tests another version.
PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?= transformers
# the version the project is tested with; used only where the environment has no torch yet
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
READY = $(VENV)/.installed

.PHONY: install test test-quick test-long lint audit docs demo clean

install: $(READY)

$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install "$(TRANSFORMERS)" -e ".[test]"
	touch $(READY)

test: $(READY)
	$(BIN)/python -m pytest

# what a change is checked with many times a day; minutes where `test` takes a quarter of an hour
test-quick: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

# thousands of damaged checkpoints; minutes
test-long: $(READY)
	$(BIN)/python -m pytest -m long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# known vulnerabilities of what is installed. Strict: a package that nobody knows anything of ends it
audit: $(READY)
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install pip-audit; }
	.venv-audit/bin/pip-audit --strict --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# strict: a broken link, an anchor that is not there or a name without a docstring's module ends it
docs: $(READY)
	$(BIN)/python -c "import mkdocs, mkdocstrings, material" 2>/dev/null || $(BIN)/pip install -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

demo: $(READY)
	$(BIN)/hf-blr demo $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
