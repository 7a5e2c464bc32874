# `make help` lists what can be made. Everything lives in .venv and runs; nothing outside this folder is touched.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# 3.11 is what the pinned versions were tested with, and the oldest that they take.
PYTHON := $(shell command -v python3.11 || command -v python3)
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
# Tests of sites run against the oldest supported line of transformers too.
OLD_TRANSFORMERS := $(VENV)/transformers-4.57

.DEFAULT_GOAL := help
.PHONY: help setup demo test squad needs-squad sst needs-sst bench faults models wheel clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

setup: $(VENV)/.dev ## .venv with the package, its extras and the tools of development

# pip with torch there, which the build needs.
define prepare
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(PIP) install --quiet --constraint constraints.txt torch numpy setuptools
endef

$(VENV)/.package: $(SOURCES)
	$(prepare)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all]'
	touch $@

$(VENV)/.dev: $(SOURCES)
	$(prepare)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all,dev]'
	touch $@ $(VENV)/.package

$(OLD_TRANSFORMERS)/.done: $(VENV)/.dev
	$(PIP) install --quiet --no-deps --target $(OLD_TRANSFORMERS) \
		'transformers==4.57.6' 'tokenizers==0.22.2' 'huggingface_hub==0.36.2' \
		requests certifi charset_normalizer idna urllib3
	PYTHONPATH=$(OLD_TRANSFORMERS) $(BIN)/python -c 'import transformers; assert transformers.__version__ == "4.57.6"'
	touch $@

demo: $(VENV)/.package ## train a small network and its probes, show what they found
	$(BIN)/diffmask-fast train toy --out runs/toy --resume
	$(BIN)/diffmask-fast show runs/toy

test: $(VENV)/.dev $(OLD_TRANSFORMERS)/.done ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels tests/ops -k "kernels or triton"
	PYTHONPATH=$(OLD_TRANSFORMERS) $(BIN)/python -m pytest tests/sites

# Slow: half an hour. MODEL, TRAIN and EVAL are a question-answering model and SQuAD files.
squad: $(if $(and $(MODEL),$(TRAIN),$(EVAL)),,needs-squad) $(VENV)/.package ## MODEL= TRAIN= EVAL= [SEED=0]: an input-masking probe on questions
	$(BIN)/diffmask-fast train squad --model $(MODEL) --train $(TRAIN) --eval $(EVAL) --seed $(or $(SEED),0) \
		--out runs/squad-$(or $(SEED),0) --resume

needs-squad:
	$(error make squad needs MODEL=folder TRAIN=file EVAL=file: a question-answering model and two SQuAD files)

# MODEL is an encoder, TRAIN and EVAL are files of sentiment trees.
sst: $(if $(and $(MODEL),$(TRAIN),$(EVAL)),,needs-sst) $(VENV)/.package ## MODEL= TRAIN= EVAL= [SEED=0]: a sentiment classifier and probes of its inputs and hidden states
	$(BIN)/diffmask-fast train sst --model $(MODEL) --train $(TRAIN) --eval $(EVAL) --seed $(or $(SEED),0) \
		--out runs/sst-$(or $(SEED),0) --resume

needs-sst:
	$(error make sst needs MODEL=folder TRAIN=file EVAL=file: an encoder and two files of sentiment trees)

bench: $(VENV)/.dev ## time gate_mix and probe_logits against what else there is
	$(BIN)/python bench/ops.py
	$(BIN)/python bench/probe.py
	$(BIN)/python -m pytest bench/test_quick.py --benchmark-group-by=func --benchmark-sort=name \
		--benchmark-columns=median,iqr,rounds --benchmark-storage=runs/quick

faults: $(VENV)/.dev ## kill trainings at random moments and compare what resumes with what was never stopped
	$(BIN)/python -m pytest -m faults

models: $(VENV)/.dev ## try the sites of every architecture of transformers and write docs/models.md
	$(BIN)/python -m pytest -m models

# With torch alone, in an environment of its own, outside this folder.
wheel: $(VENV)/.dev ## build the wheel, install it where nothing else is and try it
	rm -rf dist runs/wheel
	$(PIP) wheel --quiet --constraint constraints.txt --no-deps --no-build-isolation --wheel-dir dist .
	$(PYTHON) -m venv runs/wheel
	runs/wheel/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	cp tests/smoke.py runs/wheel && cd runs/wheel && bin/python smoke.py

clean: ## remove what was built and trained, and .venv
	rm -rf $(VENV) build dist runs *.egg-info diffmask_fast/_cpp*.so diffmask_fast/_cuda*.so
