# make train: the real thing.  make test: everything that is quick.
# Both set themselves up: .venv, the pinned packages, the weights, and where an
# NVIDIA card or a TPU is, its plugin for JAX. ACCELERATOR=cpu|cuda|tpu chooses;
# WHEELS=DIR takes all packages from a folder, for a machine without network;
# JAX=here adds to the JAX of that machine's Python what it lacks.

PYTHON ?= python3
CONFIG ?= configs/gemma3_270m.py
ARGS ?=
BIN = .venv/bin

ifeq ($(origin ACCELERATOR), undefined)
ACCELERATOR := $(shell $(PYTHON) -m mt.base.accelerator)
else ifeq ($(ACCELERATOR), cpu)
export JAX_PLATFORMS = cpu
endif
ifeq ($(JAX), here)
BIN = .venv-here/bin
INSTALLED = .venv-here/installed
else
INSTALLED = .venv/installed-$(ACCELERATOR)
endif

ifdef WHEELS
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = $(WHEELS)
endif

# Linux gives large arrays large pages: a tenth less processor time a step. In
# few arenas, as what is freed in many of them is not found again: memory grows.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2

.PHONY: train plan test test-real test-heavy test-transformers \
  test-accelerators comet test-comet bench lint lock chaos soak accelerator

train: $(INSTALLED)
	$(BIN)/python train.py --config=$(CONFIG) $(ARGS)

# What a run would take on a machine that is not here, by its own compiler:
# make plan ON=h100 CONFIG=configs/….py ARGS=--json
plan: .venv-plan/installed
	@.venv-plan/bin/python train.py --config=$(CONFIG) --plan --on=$(ON) $(ARGS)

# A file's tests share models: they stay in one process. Files go as they are
# sorted: by number of tests, the few that start processes would be the last.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  $(ARGS)

test-real: .venv/installed
	$(BIN)/python -m pytest -m real $(ARGS)

test-heavy: .venv/installed
	$(BIN)/python -m pytest -m heavy $(ARGS)

test-accelerators: .venv-plan/installed
	.venv-plan/bin/python -m pytest -m accelerators $(ARGS)

# 50 kills, about ten minutes: ARGS="KILLS SEED".  Two hours: ARGS=SECONDS.
chaos: ARGS = 50 0
chaos: .venv/installed
	$(BIN)/python -m tests.stress.chaos $(ARGS)

soak: ARGS = 7200 600
soak: .venv/installed
	$(BIN)/python -m tests.stress.soak $(ARGS)

test-transformers: .venv/installed .venv-transformers/installed
	$(BIN)/python -m pytest -m transformers $(ARGS)

# For mt.evaluate --comet=MODEL, and its test.
comet: .venv-comet/installed

test-comet: .venv/installed .venv-comet/installed
	$(BIN)/python -m pytest -m comet $(ARGS)

# Speed against the others: an hour. ARGS="--rounds=1 --steps=3 --only=ours,hf"
bench: .venv/installed .venv-bench/installed .venv-tunix/installed
	$(BIN)/python -m tests.benchmarks.speed $(ARGS)

# What a GPU or TPU does with this: a table and a JSON, in eight minutes.
accelerator: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.accelerator $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# After a change of requirements*.txt: the same versions with the hashes of all
# their files, for every machine, so that nothing else is ever installed.
lock: .venv/installed
	$(BIN)/python -m pip install --quiet uv==0.13.9
	for name in requirements requirements-plan requirements-cuda \
	    requirements-tpu; do \
	  $(BIN)/uv pip compile $$name.txt --no-deps --generate-hashes \
	    --universal --python-version 3.11 --no-annotate --no-header --quiet \
	    --output-file $$name.lock > /dev/null || exit 1; \
	done

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
	  -r requirements.lock
	@touch $@

# Compilers of GPUs and TPUs, for x86 and Linux; it sees the packages of .venv.
.venv-plan/installed: requirements-plan.lock .venv/installed
	$(PYTHON) -m venv .venv-plan
	ls -d $(CURDIR)/.venv/lib/python*/site-packages > \
	  $$(ls -d .venv-plan/lib/python*/site-packages)/project.pth
	.venv-plan/bin/python -m pip install --quiet --no-deps --require-hashes \
	  -r requirements-plan.lock
	@touch $@

.venv/installed-cpu: .venv/installed
	@touch $@

.venv/installed-cuda .venv/installed-tpu: .venv/installed-%: \
  .venv/installed requirements-%.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
	  -r requirements-$*.lock
	@touch $@

# No hashes: another Python may have to take other files.
.venv-here/installed: requirements.txt requirements-cuda.txt
	$(PYTHON) -m venv --system-site-packages .venv-here
	grep -hv '^jax\|^nvidia' requirements.txt requirements-cuda.txt \
	  > .venv-here/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps \
	  -r .venv-here/requirements.txt
	@touch $@

# With dependencies: on some machines torch brings libraries of its own.
.venv-transformers/installed: tests/requirements-transformers.txt
	$(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/python -m pip install --quiet -r $<
	@touch $@

.venv-comet/installed: requirements-comet.txt
	$(PYTHON) -m venv .venv-comet
	.venv-comet/bin/python -m pip install --quiet -r $<
	@touch $@

# llama.cpp is compiled: ten minutes, and the bench does without it if it fails.
.venv-bench/installed: tests/requirements-transformers.txt tests/requirements-bench.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -r tests/requirements-transformers.txt
	.venv-bench/bin/python -m pip install --quiet -r tests/requirements-bench.txt || \
	  echo 'llama.cpp could not be compiled: it is left out'
	@touch $@

# Apart from the others: it wants an older safetensors and another transformers.
.venv-tunix/installed: tests/requirements-tunix.txt
	$(PYTHON) -m venv .venv-tunix
	.venv-tunix/bin/python -m pip install --quiet --no-deps -r $<
	@touch $@
