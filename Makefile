# Every target makes the environment it needs: from a bare machine with Python, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: a quarter of a gigabyte less, and half of the time.
# Of conflicts pip would name what lmms-eval declares and does not need here: see its extra in pyproject.toml.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-warn-conflicts --constraint constraints.txt
# Where it is set, as in many images, none would be kept: every process would compile PyTorch's 2,000 modules anew.
unexport PYTHONDONTWRITEBYTECODE
# Exporting traces on the CPU; where the index has CUDA's build alone, TORCH=… can name a wheel without its gigabytes.
TORCH ?= torch==2.13.0

MODEL ?= demo
K ?= 64
DTYPE ?= fp32
TASKS ?= resprune_scenes
DEVICE ?= cpu
COUNT ?= 5000
DOCS ?= build/docs
# What JetPack 6's Python 3.10 runs, every command's help and `resprune build` included; pyproject.toml has it for ruff.
ON_DEVICES := -p resprune.runtime -p resprune.serving -p resprune.graphs -p resprune.exporter.tensorrt \
	-m resprune.exporter.cli -m resprune.exporter.options -m resprune.exporter.transaction \
	-m resprune.evaluation.cli -m resprune.evaluation.lmms_cli \
	-m resprune -m resprune.__main__ -m resprune.elements -m resprune.method -m resprune.names
OUT ?= build/$(notdir $(MODEL))-k$(K)$(if $(filter-out fp32,$(DTYPE)),-$(DTYPE))

.PHONY: demo web export eval bench gpu-check test fuzz test-hosts test-extras lint docs wheel clean

# .venv/with-EXTRA: the environment has this extra of pyproject.toml, beside those that were asked for before.
$(VENV)/with-%: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(filter wheel,$*),,$(TORCH)) --editable '.[$*]'
	$(if $(filter lmms test,$*),$(PIP) --no-deps lmms-eval)
	touch $@

# Not the place of the README's first export, which does not replace a bundle.
demo: $(VENV)/with-export
	$(BIN)/resprune export demo build/demo -k 16 --positions original --force
	$(BIN)/resprune ask build/demo demo/pictures/shapes.png "What color is the large square?" --show build/kept.png
	@echo "The tokens that were kept: build/kept.png"

# Of all its tokens, so that the page's slider goes from one to all.
web: $(VENV)/with-export
	cd examples/web && npm ci --ignore-scripts --no-audit --no-fund
	$(BIN)/resprune export demo build/demo-web -k 144 --split --positions original --force
	$(BIN)/python examples/web/serve.py build/demo-web --samples demo/pictures

export: $(VENV)/with-export
	$(BIN)/resprune export $(MODEL) $(OUT) -k $(K) --dtype $(DTYPE)

eval: $(VENV)/with-lmms
	$(BIN)/resprune lmms $(MODEL) --tasks $(TASKS) -k $(K) --device $(DEVICE) \
		--out build/lmms/$(notdir $(MODEL))$(if $(LIMIT),-limit$(LIMIT) --limit $(LIMIT))

bench: $(VENV)/with-test
	$(BIN)/python -m benchmarks

gpu-check: $(VENV)/with-test
	$(BIN)/python -m benchmarks.gpu_check

# A file's tests share a process, and with it what its fixtures hold; the files go in the order of tests/conftest.py.
# Three processes on two cores: one waits now and then for what another exports, for a server or for a download.
test: $(VENV)/with-test
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Hostile images, bundles, checkpoints, options and servers; SEED=N repeats a run.
fuzz: $(VENV)/with-test
	$(BIN)/python -m tests.hostile.fuzz --count $(COUNT)$(if $(SEED), --seed $(SEED))

# Real hosts of a bundle: each is installed in a place of its own, started, tested, stopped.
test-hosts: $(VENV)/with-test
	$(BIN)/python -m pytest tests/hosts

# Every extra alone in an environment of its own.
test-extras: $(VENV)/with-test
	$(BIN)/python -m pytest tests/extras

lint: $(VENV)/with-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p resprune
	$(BIN)/mypy --python-version 3.10 --follow-imports silent $(ON_DEVICES)
	$(BIN)/basedpyright --pythonpath $(BIN)/python $$(find -L resprune -name '*.py')

# The Python reference, from the docstrings: build/docs/index.html.
docs: $(VENV)/with-docs
	rm -rf $(DOCS)
	$(BIN)/python docs/reference.py $(DOCS)

# From an empty folder: setuptools would put what an earlier build left there into the next one.
wheel: $(VENV)/with-wheel
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
