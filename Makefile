# Everything below works on a fresh clone with Python 3.11+ and a package registry; `make` alone lists the targets.

PYTHON ?= python3
RECIPE ?= recipes/demo.yaml
RUN ?= runs/$(basename $(notdir $(RECIPE)))
VENV := .venv
BIN := $(VENV)/bin
ORACLES := .venv-oracles
# Where caches live unless FPO_STORE says otherwise; the bare `fpo` command uses ~/.cache/fpo.
export FPO_STORE ?= $(CURDIR)/caches

.DEFAULT_GOAL := help
.PHONY: help demo cache align evaluate test test-long test-store test-families test-browser test-oracles families check lint docs study bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Models this small gain nothing from a second thread, and lose much where the cores are shared.
demo: export OMP_NUM_THREADS ?= 1
demo: $(VENV)/installed  ## from nothing to an aligned policy and its evaluation, in minutes on a CPU
	$(BIN)/python -m fpo.demo.build
	$(BIN)/fpo cache recipes/demo.yaml
	$(BIN)/fpo align recipes/demo.yaml --output runs/demo --resume
	$(BIN)/fpo evaluate runs/demo --samples 200 --max-new-tokens 96
	$(BIN)/python -m fpo.demo.evaluate runs/demo
	$(BIN)/fpo features runs/demo --samples 200 --max-new-tokens 96 --top 5 --html runs/demo/features.html
	@echo
	@echo "world   demo-world/       model, SAE and pairs"
	@echo "caches  $(FPO_STORE)"
	@echo "run     runs/demo/        policy, metrics.jsonl, recipe.yaml, evaluation.json"
	@echo "report  runs/demo/features.html    what training did to the features, and how well the cache told it"
	@echo "fpo     source .venv/bin/activate    (then the command is there)"
	@echo "next    make align RECIPE=recipes/demo-dpo.yaml     (another objective, from the same cache)"

cache: $(VENV)/installed  ## stage 1: the recipe's pairs through the reference, once (RECIPE=...)
	@$(if $(findstring recipes/demo,$(RECIPE)),$(BIN)/python -m fpo.demo.build)
	$(BIN)/fpo cache $(RECIPE)

align: $(VENV)/installed  ## stage 2: train the recipe's policy from its cache (RECIPE=... RUN=...)
	$(BIN)/fpo align $(RECIPE) --output $(RUN) --resume

evaluate: $(VENV)/installed  ## held-out metrics of a run (RUN=...)
	$(BIN)/fpo evaluate $(RUN)

test: $(VENV)/installed-test  ## set up and run the tests, but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-long: $(VENV)/installed-test  ## whole runs, processes and kills, which take seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'long and not campaign and not oracle'

test-store: $(VENV)/installed-test  ## the long rounds of the store: kills, damage, fuzzing, scale
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m campaign -s

test-families: $(VENV)/installed-test  ## a tiny model of every family against separate forwards
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m families

test-browser: $(VENV)/installed-test  ## open pages in a headless Chromium (apt install chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

test-oracles: $(ORACLES)/installed  ## compare with TRL, sae-lens and eai-sparsify, in an environment of their own
	OMP_NUM_THREADS=1 $(ORACLES)/bin/python -m pytest -m oracle

check: lint test test-long  ## all that CI runs, but the oracles and the families

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/as-package && ln -sfn $(CURDIR) $(VENV)/as-package/fpo
	$(BIN)/mypy

docs: $(VENV)/installed  ## write docs/recipe.md and docs/saes.md from the code
	$(BIN)/python -c "from fpo import recipe; print(recipe.reference_page(), end='')" > docs/recipe.md
	$(BIN)/python -c "from fpo.scoring.sae.page import formats_page; print(formats_page(), end='')" > docs/saes.md

families: $(VENV)/installed-test  ## write docs/families.md: how each model family is laid out
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/family_models.py

study: $(VENV)/installed  ## docs/study.md anew: every method over seeds in the demo world, in under an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m fpo.demo.study --output runs/study
	OMP_NUM_THREADS=1 $(BIN)/python -m fpo.demo.study.page docs/study.md --study runs/study

bench: $(VENV)/installed  ## steps from the cache against padded two-model steps; the store against other formats
	$(BIN)/python -m fpo.demo.build
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/align.py demo-world/pairs/train.jsonl --tokenizer demo-world/model
	$(BIN)/python benchmarks/store.py

clean:  ## remove environments and what the demo made; caches elsewhere stay
	rm -rf $(VENV) $(ORACLES) demo-world demo-world.building runs/demo caches

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lora]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lora,test]'
	@touch $@

$(ORACLES)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ORACLES)
	$(ORACLES)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,oracles]'
	@touch $@
