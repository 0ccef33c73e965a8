# One environment, made on first use. `make test VENV=.venv50 TRANSFORMERS='transformers==5.0.0'` tests another version.
PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?= transformers
# the version the project is tested with; used only where the environment has no torch yet
TORCH ?= torch==2.13.0
# tests run in so many processes; 0 is this one alone
WORKERS ?= 2
BIN = $(VENV)/bin
READY = $(VENV)/.installed
# files stay whole, as their tests share fixtures; models are too small for more than one thread each
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

#: the oldest releases that setup.cfg allows, but for torch's, which brings its own
LOWER = $(shell sed -n 's/^    \([a-z]*\) >= \([0-9.]*\).*/\1==\2/p' setup.cfg | grep -E '^(transformers|accelerate|peft|datasets|safetensors)==')
LOWER_BIN = .venv-lower/bin
#: loading, saving, compressing, adapters, the Trainer, text
LOWER_TESTS = tests/test_integration_*.py tests/test_compress.py tests/test_peft_twins.py tests/test_finetune.py \
	tests/test_resume.py tests/test_shards.py tests/test_memory.py tests/test_formats.py tests/test_text*.py

#: what `test` leaves out where the tools are missing
TOOL_TESTS = tests/test_diffusers.py tests/test_linears.py tests/test_serve.py tests/test_tasks.py
#: the newest vLLM that was tried
VLLM ?= vllm==0.33.0

.PHONY: install test test-quick test-long test-lower test-tools test-vllm lint audit docs demo clean

install: $(READY)

$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install "$(TRANSFORMERS)" -e ".[test]"
	touch $(READY)

test: $(READY)
	$(PYTEST)

# what a change is checked with many times a day; a few minutes where `test` takes ten
test-quick: $(READY)
	$(PYTEST) -m "not slow and not gpu"

# thousands of damaged checkpoints; minutes
test-long: $(READY)
	$(PYTEST) -m long

# the lower bounds of the dependencies, in an environment of their own; ten minutes
test-lower:
	test -x $(LOWER_BIN)/python || $(PYTHON) -m venv .venv-lower
	$(LOWER_BIN)/pip install "$(TORCH)" $(LOWER) -e . "pytest >= 8" "pytest-xdist >= 3.6" "hypothesis >= 6"
	OMP_NUM_THREADS=1 $(LOWER_BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(LOWER_TESTS)

# tools that would be much to install for everybody: exports, servers, diffusers, lm-eval
test-tools:
	test -x .venv-tools/bin/python || $(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install "$(TORCH)" "$(TRANSFORMERS)" -e ".[tools]" "pytest >= 8" "pytest-xdist >= 3.6"
	OMP_NUM_THREADS=1 .venv-tools/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TOOL_TESTS)

# vLLM's own classes on the CPU, with the torch of the other tests in place of its own
test-vllm:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install "$(TORCH)" -r tests/vllm_on_cpu.txt -e . "pytest >= 8" "hypothesis >= 6"
	.venv-vllm/bin/pip install --no-deps "$(VLLM)"
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/test_vllm.py tests/test_vllm_shards.py

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
