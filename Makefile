# Every target makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of conflicts pip would name what lmms-eval declares and does not need here: see its extra in pyproject.toml.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts --constraint constraints.txt
# A plain `torch` can fetch gigabytes of CUDA; exporting traces on the CPU.
TORCH ?= torch==2.13.0

MODEL ?= demo
K ?= 64
TASKS ?= resprune_scenes
DEVICE ?= cpu
OUT ?= build/$(notdir $(MODEL))-k$(K)

.PHONY: setup demo web test test-hosts lint export eval bench gpu-check clean

# $(1): an extra of pyproject.toml.
define install
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(PIP) $(TORCH)
$(PIP) --editable '.[$(1)]'
$(PIP) --no-deps lmms-eval
touch $@
endef

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,test)

$(VENV)/lmms: pyproject.toml constraints.txt
	$(call install,lmms)

test: setup
	$(BIN)/python -m pytest

# Real hosts of a bundle: each is installed in a place of its own, started, tested, stopped.
test-hosts: setup
	$(BIN)/python -m pytest tests/hosts

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p resprune

demo: setup
	$(BIN)/resprune export demo build/demo-k16 -k 16 --positions original --force
	$(BIN)/resprune ask build/demo-k16 demo/pictures/shapes.png "What color is the large square?" --show build/kept.png
	@echo "The tokens that were kept: build/kept.png"

# Of all its tokens, so that the page's slider goes from one to all.
web: setup
	cd examples/web && npm ci --ignore-scripts --no-audit --no-fund
	$(BIN)/resprune export demo build/demo-web -k 144 --split --positions original --force
	$(BIN)/python examples/web/serve.py build/demo-web --samples demo/pictures

bench: setup
	$(BIN)/python -m benchmarks

gpu-check: setup
	$(BIN)/python -m benchmarks.gpu_check

eval: $(VENV)/lmms
	$(BIN)/resprune lmms $(MODEL) --tasks $(TASKS) -k $(K) --device $(DEVICE) \
		--out build/lmms/$(notdir $(MODEL))$(if $(LIMIT),-limit$(LIMIT) --limit $(LIMIT))

export: setup
	$(BIN)/resprune export $(MODEL) $(OUT) -k $(K)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
