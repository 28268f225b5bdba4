# Two commands set everything up by themselves: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
# With the CPU build of torch at hand: make TORCH="torch==2.13.0" quickstart
TORCH  ?= torch==2.13.0

.PHONY: quickstart smoke test test-all lint format clean

$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hpt_hf needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

quickstart: $(VENV)/.installed
	$(RUN) -m hpt_hf.lab.quickstart

smoke: $(VENV)/.installed
	$(RUN) -m hpt_hf.lab.quickstart --smoke --output outputs/smoke

test: $(VENV)/.installed
	$(RUN) -m pytest

test-all: $(VENV)/.installed
	$(RUN) -m pytest -m 'not gpu'

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf outputs build *.egg-info .pytest_cache .ruff_cache
