# The two commands: `make serve` and `make test`.  Each can be interrupted and run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2
ARGS ?=
HOST ?= 127.0.0.1
PORT ?= 8000
# Nothing here needs a model hub, and none is waited for.
export HF_HUB_OFFLINE ?= 1

.PHONY: help install serve service-demo screenshot wheel test test-all test-wheel npu-emulator lint format clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.cpu  ## Make .venv with everything that serving on a CPU needs.

serve: $(VENV)/.cpu  ## Prepare a small real model and serve it over the OpenAI API.
	@$(BIN)/python scripts/serve_demo.py --model "$(MODEL)" --host $(HOST) --port $(PORT) $(ARGS)

service-demo: $(VENV)/.cpu  ## Kill one of two servers behind xllm service: every stream completes.
	@$(BIN)/python scripts/service_demo.py $(ARGS)

screenshot: $(VENV)/.dev  ## Make docs/dashboard.png anew (needs Chromium).
	$(BIN)/python scripts/dashboard_screenshot.py

test: $(VENV)/.dev lint  ## Run every test tier, one model each (under 15 minutes on 2 cores).
	$(BIN)/python -m pytest -m "not full" --durations=15

test-all: $(VENV)/.dev lint  ## Run the full matrix.
	$(BIN)/python -m pytest --durations=25
	$(MAKE) test-wheel

wheel: $(VENV)/.dev  ## Build dist/*.whl with the service's hot path compiled (needs a C compiler; 2 min).
	HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(BIN)/python -m build --outdir dist .

test-wheel: wheel  ## Run the service's tests on what that wheel holds.
	scripts/test_wheel.sh $(BIN)/python dist

npu-emulator: $(VENV)/.dev  ## Prepare the emulated Ascend NPU (44 MB); prints what to export.
	@$(BIN)/python -m xllm_plugin.testing.cann

lint: $(VENV)/.dev  ## Check format, style, types and the direction of imports.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove .venv and caches; models stay in the user's cache folder.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp is touched after its install has succeeded, so an interrupted one is done again.
$(VENV)/.cpu: pyproject.toml scripts/install.sh
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) cpu
	@touch $@

$(VENV)/.dev: pyproject.toml scripts/install.sh
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) cpu,dev
	@touch $(VENV)/.cpu $@
