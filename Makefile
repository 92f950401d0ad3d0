# Two commands: `make demo` and `make test`. Both make .venv first, from pyproject.toml with constraints.txt.
# `make docs` makes the documentation's site, in an environment of its own.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := smollm2-135m
DEMO := runs/demo
DISCOVER := $(BIN)/headscope discover --model $(MODEL) --out $(DEMO)/heads --top 5
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test fast lint docs clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev,sites,triton,evaluation]'
	touch $@

# discover, ablate, re-evaluate, show: needles that were not used to find the heads judge the ablation
demo: $(READY)
	$(DISCOVER) sinks --samples 16
	$(DISCOVER) induction
	$(DISCOVER) retrieval --lengths 600,1000 --depths 0,50,100
	$(BIN)/headscope evaluate needle,text_loss --model $(MODEL) --ablate $(DEMO)/heads/retrieval.json --top 10 \
		--lengths 600 --depths 0,100 --set 'needles=["password","train","prize"]' \
		--set passages=2 --controls 10 --out $(DEMO)/evaluation
	$(BIN)/headscope report $(DEMO) --prompt 'The brass key is under the flowerpot. Where is the brass key? The brass key is under'

# what quantises weights stands apart: torchao, once installed, writes to stderr in every process that imports transformers
QUANTISERS := .venv/quantisers
$(QUANTISERS)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(QUANTISERS) \
		-c constraints.txt torchao bitsandbytes
	touch $@

test: $(READY) $(QUANTISERS)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25
	OMP_NUM_THREADS=1 PYTHONPATH=$(QUANTISERS) $(BIN)/python -m pytest -n 2 -k 'quanti or bitsandbytes' \
		tests/interp/parallel/test_processes.py tests/interp/sites/test_precision.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=900 notebooks

# the fast tier: no downloaded model, a few minutes
fast: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip -c constraints.txt
	.venv-docs/bin/python -m pip install --progress-bar on -c constraints.txt --group docs
	touch $@

# site/index.html; a warning (a link that leads nowhere, a name that is not there) is an error. Nothing is fetched.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-docs site runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache
