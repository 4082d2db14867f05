# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# For what is installed, and for what builds it.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test fast test-server lint clean

demo: $(VENV)/run
	$(BIN)/miniplm run recipes/quickstart.yaml

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fast: $(VENV)/dev                      ## the tests that take a moment, for the inner loop
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-server: $(VENV)/server             ## against a real llama-cpp-python server; builds it first, which takes minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/scoring/test_llama_server.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: asked for by its exact version, pip takes the CPU build where one is at hand;
# asked for by another package, it takes the newest build and several GB of CUDA with it.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/run: pyproject.toml $(VENV)/torch
	$(BIN)/python -m pip install --quiet -e ".[train,report]"
	touch $@

$(VENV)/dev: pyproject.toml $(VENV)/run
	$(BIN)/python -m pip install --quiet -e ".[train,report,dev]"
	touch $@

$(VENV)/server: $(VENV)/dev
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet "llama-cpp-python[server]==0.3.36" gguf==0.19.0
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
