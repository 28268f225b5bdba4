# Two commands set everything up by themselves: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
# With the CPU build of torch at hand: make TORCH="torch==2.13.0" quickstart
TORCH  ?= torch==2.13.0

.PHONY: quickstart smoke demo test-demo interop bench docs dist test test-all lint format clean

$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hpt_hf needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

quickstart: $(VENV)/.installed
	$(RUN) -m hpt_hf quickstart

smoke: $(VENV)/.installed
	$(RUN) -m hpt_hf quickstart --smoke true --output_dir outputs/smoke

# In an environment of its own: gradio wants an older Pillow, whose resize rounds some of the lab's pictures otherwise, and Scores name their pictures by digest.
.venv-demo/.installed: setup.py
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	touch $@

demo: .venv-demo/.installed
	.venv-demo/bin/python recipes/demo.py

test-demo: .venv-demo/.installed
	.venv-demo/bin/python -m pytest tests/commands/test_demo.py

test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.installed
	$(RUN) -m pytest -m 'not gpu'

# Parity with the open_clip package: it needs torchvision, and so torch's full build (6 GB), in an environment of its own.
interop:
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,openclip]'
	.venv-interop/bin/python -m pytest tests/models/test_open_clip.py tests/publishing/test_convert_checkpoint.py

bench: $(VENV)/.installed
	$(RUN) benchmarks/step.py --output outputs/bench

# The site of docs/*.md and the API's docstrings, in outputs/site; a warning is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# A release: version in setup.py and CITATION.cff, a heading with its date in CHANGELOG.md, then this, a tag, and an upload with twine.
dist: $(VENV)/.installed
	rm -rf dist build
	$(RUN) -m pip install --quiet --disable-pip-version-check build
	$(RUN) -m build

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_architecture.py

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf outputs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
