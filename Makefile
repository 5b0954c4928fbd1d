# Two commands for a newcomer: `make demo` and `make test`. Both create .venv first and resume where they stopped.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export OMP_WAIT_POLICY ?= passive

comma := ,

.PHONY: demo serve test slow lint docs dist clean help

help:
	@echo "make demo   train, index, retrieve and generate on real text, in about ten minutes on two CPU cores"
	@echo "make serve  an OpenAI-compatible server and its page on what the demo trained"
	@echo "make test   run the tests"
	@echo "make slow   run the slow tests"
	@echo "make lint   ruff and pyright"
	@echo "make docs   build the documentation in site/ and check every link"
	@echo "make dist   build the wheel and the sdist in dist/ and check them"

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python >= 3.11 is needed, this is {v[0]}.{v[1]}; name another one: make PYTHON=python3.12")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the pinned versions into $(VENV), about a minute on a fast line"
	@$(PY) -m pip install -q --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[$(if $(filter dev,$*),all$(comma)dev,$*)]'
	@touch $@

demo: $(VENV)/.installed-all
	$(VENV)/bin/cosup-fast demo

serve: demo
	$(VENV)/bin/cosup-fast serve runs/demo/run

test: $(VENV)/.installed-dev
	$(PY) -m pytest

slow: $(VENV)/.installed-dev
	$(PY) -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html, or serve the folder: $(PY) -m http.server --directory site"

dist: $(VENV)/.installed-dev
	rm -rf build dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist site *.egg-info
