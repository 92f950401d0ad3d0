# Two commands: `make demo` and `make test`. Both make .venv first, from pyproject.toml with constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := smollm2-135m
DEMO := runs/demo
DISCOVER := $(BIN)/headscope discover --model $(MODEL) --out $(DEMO)/heads --top 5
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test fast lint clean
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

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=900 notebooks

# the fast tier: no downloaded model, a few minutes
fast: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache
