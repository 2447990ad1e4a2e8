# Every target sets up what it needs: `make demo` or `make test` is all a fresh machine with Python >= 3.11 wants.
# `make test` is what to run before a commit, `make test-slow` the rest of what CI runs. `make explore` draws new samples
# for the property-based tests: what it finds becomes a test with a fixed sample.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow explore check format configuration bench clean

demo: $(INSTALLED)
	$(BIN)/python -m pipeline.demo

test: check
	$(BIN)/python -m pytest -m "not slow" --durations=10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --durations=10

explore: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu" --hypothesis-profile=default --hypothesis-show-statistics \
		$$(grep -l "^from hypothesis" tests/*/*.py)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

configuration: $(INSTALLED)
	$(BIN)/python -m pipeline.engine.config_page docs/configuration.md

bench: $(INSTALLED)
	$(BIN)/python -m pipeline.bench host

# torch first and by its exact version: a bare `torch` may resolve to a build that is larger by gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ringfeed needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
