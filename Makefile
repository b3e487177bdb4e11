# make quickstart   set up, train a small model on this machine's Python source, continue `def `
# make test         linter, types, import rules, all tests (under ten minutes on two cores)
# make test-full    also the whole of every matrix of which `make test` runs a sample
# make test-mindspore   MindSpore, in an environment of its own, reads what Slipway writes
# make test-crash   tests that kill processes, at length

PYTHON ?= python3
VENV ?= .venv
MINDSPORE ?= .venv-mindspore
BIN := $(VENV)/bin
QUICKSTART := --config configs/quickstart.yaml
LINT_PATHS := launcher models tests benchmarks run.py

# It makes the environment; what runs in that (`msrun.sh` reads PYTHON) uses the environment's own.
unexport PYTHON

.PHONY: quickstart test test-full test-mindspore test-crash lint tests docs clean

quickstart: $(VENV)/installed data/quickstart/prepared.json
	$(BIN)/python run.py $(QUICKSTART) --run_mode train
	$(BIN)/python run.py $(QUICKSTART) --run_mode predict \
	    --load_checkpoint output/quickstart/checkpoint --predict_data 'def '
	@echo "The loss curve is output/quickstart/loss.png"

test: lint tests

lint: $(VENV)/installed-dev
	$(BIN)/ruff check $(LINT_PATHS)
	$(BIN)/ruff format --check $(LINT_PATHS)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text
	$(BIN)/lint-imports

tests: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not crash and not mindspore"

test-full: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not crash and not mindspore"

test-crash: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m crash

test-mindspore: $(VENV)/installed-dev $(MINDSPORE)/installed
	SLIPWAY_MINDSPORE=$(abspath $(MINDSPORE)/bin/python) $(BIN)/python -m pytest -n 2 -m mindspore

docs: $(VENV)/installed
	$(BIN)/python -m launcher.tools.config_docs

data/quickstart/prepared.json: | $(VENV)/installed
	$(BIN)/python -m launcher.tools.prepare_quickstart --output_dir data/quickstart

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Slipway needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed

$(MINDSPORE)/installed:
	$(PYTHON) -m venv $(MINDSPORE)
	$(MINDSPORE)/bin/python -m pip install -q --disable-pip-version-check mindspore==2.10.0 'numpy<2'
	@touch $@

clean:
	rm -rf output data/quickstart
