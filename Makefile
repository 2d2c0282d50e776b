# make demo   sets up a virtual environment and runs the main job on the base that ships with the tool
# make test   sets up the same environment with the development tools and runs the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
.DEFAULT_GOAL := demo
# What the job makes there, and all that is ever removed there: OUT may hold other files.
MADE    = "$(OUT)/shards" "$(OUT)/package" "$(OUT)/sm.safetensors" "$(OUT)/eval"
WISE   := $(BIN)/wise

.PHONY: demo test campaign families kill lifelong bench speed gate papers check base edits clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	rm -rf $(MADE)
	@echo '--- before: the base as it is'
	@$(WISE) chat < examples/questions.txt
	$(WISE) edit examples/edits.jsonl --out $(OUT)/shards
	$(WISE) merge $(OUT)/shards -o $(OUT)/sm.safetensors
	$(WISE) eval --dataset demo --side-memory $(OUT)/sm.safetensors -o $(OUT)/eval --png
	$(WISE) package $(OUT)/sm.safetensors --eval $(OUT)/eval -o $(OUT)/package
	@echo '--- after: the same questions, with the side memory'
	@$(WISE) chat --side-memory $(OUT)/package < examples/questions.txt

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# Minutes of work: the README's figures as bounds, and what each choice of the schedule is worth.
campaign: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m campaign

# Minutes of work: every architecture of transformers, tiny and random, edited end to end; writes docs/architectures.md.
families: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m families tests/test_families.py

# A hundred SIGKILLs at random moments, full disks and a torn ledger: the same bytes in the end, every time.
kill: $(VENV)/.installed
	$(BIN)/python benchmarks/kill.py --kills 100

# Two hours of CPU time: portions and withdrawn edits, a thousand edits in one go, many memories and keys.
lifelong: $(VENV)/.installed
	$(BIN)/python benchmarks/lifelong.py
	$(BIN)/python benchmarks/long_stream.py --folder $(OUT)/long-stream
	$(BIN)/python benchmarks/routing.py

# An hour of CPU time: what each choice costs and brings, and how fast everything is.
bench: $(VENV)/.installed speed
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/fold.py --edits 100
	$(BIN)/python benchmarks/router.py --edits 100 --seed 8 --generate
	$(BIN)/python benchmarks/footprint.py

# Tens of minutes of one thread: how fast everything is, as ratios measured in one run.
speed: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --out $(OUT)/speed.json

# An hour of CPU time: the README's figures, three seeds of each; stopped and started again it goes on where it was.
gate: $(VENV)/.installed
	$(BIN)/python benchmarks/gate.py --out $(OUT)/gate.jsonl

# The papers' records, where WISE_DATA names a folder that holds them, learned and evaluated on the demonstration base.
papers: $(VENV)/.installed
	for d in zsre hallucination temporal; do $(WISE) eval --dataset $$d --learn -o $(OUT)/$$d || exit 1; done

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Train the demonstration base anew (about half an hour on 2 CPU cores) and write its edits.
base: $(VENV)/.installed-dev
	$(BIN)/python examples/demo_base/train.py --out wisecli/base --bf16

edits: $(VENV)/.installed-dev
	$(BIN)/python examples/demo_base/build_edits.py examples/edits.jsonl wisecli/data/demo_edits.jsonl
	$(BIN)/python examples/demo_base/build_edits.py --edits 500 --seed 8 examples/edits_500.jsonl
	$(BIN)/python examples/demo_base/build_pool.py examples/edits.jsonl wisecli/data/pool_facts.jsonl

clean:
	rm -rf $(VENV) $(MADE) build dist *.egg-info
