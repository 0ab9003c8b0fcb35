# Every target makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A plain `torch` can fetch gigabytes of CUDA; exporting traces on the CPU.
TORCH ?= torch==2.13.0

MODEL ?= demo
K ?= 64
TASKS ?= gqa
DEVICE ?= cpu
OUT ?= build/$(notdir $(MODEL))-k$(K)
ROOMS := evaluation exporter graphs runtime

.PHONY: setup demo test lint export eval bench gpu-check clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[test]'
	touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typecheck/resprune
	for room in $(ROOMS); do ln -sfn ../../../$$room build/typecheck/resprune/$$room; done
	MYPYPATH=build/typecheck $(BIN)/mypy $(ROOMS:%=-p resprune.%)

demo: setup
	$(BIN)/resprune export demo build/demo-k16 -k 16 --positions original --force
	$(BIN)/resprune ask build/demo-k16 demo/pictures/shapes.png "What color is the large square?" --show build/kept.png
	@echo "The tokens that were kept: build/kept.png"

bench: setup
	$(BIN)/python -m benchmarks

gpu-check: setup
	$(BIN)/python -m benchmarks.gpu_check

eval: $(VENV)/lmms
	$(BIN)/python -m lmms_eval --model resprune --model_args model=$(MODEL),k=$(K),device=$(DEVICE) \
		--tasks $(TASKS) --batch_size 1 --output_path build/lmms

$(VENV)/lmms: $(VENV)/installed
	$(PIP) $(TORCH) --editable '.[lmms]'
	touch $@

export: setup
	$(BIN)/resprune export $(MODEL) $(OUT) -k $(K)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
