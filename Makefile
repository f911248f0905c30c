# make demo   prune the shipped ViT on the shipped images; writes demo/
# make test   everything: export in sync, notebooks, solutions, pytest
# make lab    the course in JupyterLab
#
# All of them run in $(VENV), which is made once, and again when settings.ini or setup.py change.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check
RUN     = $(VENV)/.installed-run
DEV     = $(VENV)/.installed-dev
# The oldest timm that settings.ini allows, in a folder of its own: tests/test_weights.py reads hostile files under it too.
OLDEST  = $(VENV)/oldest-timm
TIMM    = $(shell sed -n 's/^requirements.* timm>=\([0-9.]*\).*/\1/p' settings.ini)

.PHONY: help demo test test-sync test-notebooks test-suite test-slow lab install install-dev notebooks export results record tournament tournament-asked clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n '1,3s/^# //p' Makefile

# What tests leave in the temporary folder goes with them.
IN_TEMP = tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && TMPDIR=$$tmp

demo: $(RUN)
	$(BIN)/vitprune demo --out demo

test: test-sync test-notebooks test-suite
	@echo "make test: all parts passed"

test-sync: $(DEV)
	$(BIN)/python -m pytest -q tests/test_sync.py

test-notebooks: $(DEV)
	$(IN_TEMP) $(BIN)/python tests/notebooks.py

test-suite: $(DEV) $(OLDEST)/.installed
	$(IN_TEMP) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 tests

# What `make test` samples only: hundreds of kills, and whatever else is marked slow.
test-slow: $(DEV)
	$(IN_TEMP) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --durations=10 tests

lab: $(DEV)
	$(BIN)/jupyter lab nbs/index.ipynb

install: $(RUN)
install-dev: $(DEV) $(OLDEST)/.installed

# Run every notebook from top to bottom, keep its outputs, drop its execution counts.
notebooks: $(DEV)
	$(BIN)/python tests/notebooks.py --keep

export: $(DEV)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

# Measure again what the README shows: demo.csv, the picture and the blocks between the markers.
results: $(DEV)
	$(BIN)/vitprune demo --out demo
	$(BIN)/python tests/readme.py --measured demo

# Measure again what the slow cells and the timing grid record. CIFAR100=FOLDER WEIGHTS=FILE adds the run on CIFAR-100 (DENSE=FILE: from that dense model), PHOTOS=FOLDER WEIGHTS=FILE the features of a ViT-S/14.
# Timing skips what is recorded, so the line with the most rounds for a case stands first.
TIMING = $(BIN)/python -m vitprune_nb.papers.timing --shares course --devices cpu
TI = deit_tiny_patch16_224
S = deit_small_patch16_224
B = deit_base_patch16_224
STATIC = 'patch slimming, keys entering' 'patch slimming, keys all' uniform vtp 'vtp, multiples of 16' 'vtp, whole heads' 'vtp, whole heads, multiples of 64' life
EAGER32 = --batches 32 --dtypes fp32 --engines eager --methods $(STATIC)
BF16_128 = --backbones $(S) --batches 128 --dtypes bf16 --engines eager --repeats 3 --session 1 --methods $(STATIC) --out data/results/timing_pages.csv
KEEP = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
# One run on CIFAR-100: $(call cifar100,NAME,CHANGES). Where runs/NAME is missing and the run can begin, the rows that came with the repository make room for its own.
cifar100_run = $(BIN)/vitprune run configs/cifar100_cpu.toml --data $(CIFAR100) --set dense=$(or $(DENSE),runs/dense/dense.safetensors) --out runs/$(1) --results data/results/$(1).csv $(2)
cifar100 = test -d runs/$(1) || { $(cifar100_run) --dry-run && rm -f data/results/$(1).csv data/results/$(1)_pairs.csv data/results/$(1)_answers.csv; }; $(cifar100_run)
SEEDS = --set methods=patch-slimming,uniform,random,attention --set reductions=0.35 --set seeds=1,2,3 --set control=false
LONGER = --set reductions=0.35 --set recover.epochs=0.5
TRAINED = --set methods=cosine,life,vtp,random --set reductions=0.35 --set control=false --set options.vtp.sparse_epochs=1.6 --set options.life.predictor_epochs=0.2 --set options.life.backbone_epochs=0.1 --set options.life.batch_size=10 --set options.cosine.calibration=320 --set recover.epochs=0.5
CALIBRATION = --set methods=patch-slimming,uniform --set reductions=0.35 --set seeds=0,1,2,3 --set calibration=256 --set recover={} --set control=false
record: $(DEV)
	$(if $(WEIGHTS),VITPRUNE_GALLERY=$(abspath $(WEIGHTS))) $(BIN)/python tests/notebooks.py --record
	$(TIMING) --batches 1 --engines eager --repeats 30
	$(TIMING) --batches 32 --dtypes fp32 --engines eager --repeats 30
	$(TIMING) --backbones $(TI) $(S) --batches 1 --engines compile --repeats 30
	$(TIMING) --backbones $(TI) --batches 8 32 --dtypes fp32 --engines compile --repeats 30
	$(TIMING) --backbones $(TI) --batches 32 --dtypes fp32 --engines frozen --repeats 30
	$(TIMING) --backbones $(B) --batches 1 --engines compile --repeats 10
	$(TIMING) --batches 8 32 --dtypes bf16 --engines eager --repeats 10
	$(TIMING) --backbones $(TI) $(S) --batches 8 --dtypes bf16 --engines compile --repeats 10
	$(TIMING) --backbones $(TI) --batches 32 --dtypes bf16 --engines compile --repeats 10
	$(TIMING) --batches 8 32 --engines eager compile --repeats 5
	$(TIMING) --batches 32 --dtypes fp32 --engines frozen --repeats 5
	$(TIMING) --batches 128 --engines eager compile --repeats 3
	for s in 1 2 3 4 5 6 7; do $(TIMING) $(EAGER32) --repeats 6 --session $$s --out data/results/timing_sessions.csv || exit; done
	$(TIMING) $(BF16_128)
	$(KEEP) $(TIMING) $(BF16_128)
	for s in 1 2 3; do $(KEEP) $(TIMING) $(EAGER32) --repeats 4 --session $$s --out data/results/timing_pages.csv || exit; done
	$(if $(CIFAR100),$(if $(DENSE),,$(BIN)/python -m vitprune_nb.evidence.dense --data $(CIFAR100) --weights $(WEIGHTS)))
	$(if $(CIFAR100),$(call cifar100,cifar100,))
	$(if $(CIFAR100),$(call cifar100,cifar100_seeds,$(SEEDS)))
	$(if $(CIFAR100),$(call cifar100,cifar100_longer,$(LONGER)))
	$(if $(CIFAR100),$(call cifar100,cifar100_trained,$(TRAINED)))
	$(if $(CIFAR100),$(call cifar100,cifar100_calibration,$(CALIBRATION)))
	$(if $(PHOTOS),$(BIN)/python -m vitprune_nb.papers.imagenet --model vit_small_patch14_dinov2 --weights $(WEIGHTS) --img-size 224 --data $(PHOTOS) --name 'ViT-S/14 (DINOv2) at 224 px')
	$(MAKE) results

# The tournament, from the dense model to the tables: CIFAR100=FOLDER WEIGHTS=FILE (DENSE=FILE: from that dense model). Says how long it will take, goes on where it was killed.
# $(call anew,FOLDER OF runs,ROWS,COMMAND): where the folder is missing and the run can begin, the rows that came with the repository make room for its own.
anew = { test -d runs/$(1) || { $(3) --dry-run && rm -f $(2); }; } && $(3)
ON_DENSE = $(BIN)/vitprune run configs/tournament.toml --data $(CIFAR100) --set dense=$(or $(DENSE),runs/dense/dense.safetensors) --out runs/$(1) --results data/results/$(1).csv
TOURNAMENT = $(call ON_DENSE,tournament)
RECIPE = $(BIN)/vitprune run configs/tournament_recipe.toml --data $(CIFAR100) --set recover.lr=$(1) --out runs/recipe-$(1) --results data/results/tournament_recipe_$(1).csv $(2)
recipe = $(call anew,recipe-$(1),data/results/tournament_recipe_$(1)*.csv,$(call RECIPE,$(1),$(2)))
HELD_OUT = --set dense=runs/recipe-1e-4/dense.safetensors
# VTP's λ, on the same 5,000 images with half a pass for a row; and the tournament's row with what was best there (λ times steps stays).
GATES = --set methods=vtp --set control=false --set chance=false --set options.vtp.sparse_epochs=0.25 --set options.vtp.gate_start=0.0025 --set options.vtp.lr=5e-5 --set options.vtp.batch_size=32
GATES_RUN = $(BIN)/vitprune run configs/tournament_recipe.toml --data $(CIFAR100) --out runs/recipe-vtp-$(1) --results data/results/tournament_vtp_$(1).csv $(HELD_OUT) $(GATES) --set options.vtp.l1=$(1)
gates = $(call anew,recipe-vtp-$(1),data/results/tournament_vtp_$(1)*.csv,$(call GATES_RUN,$(1)))
WEAKER = --set methods=vtp --set reductions=0.35 --set control=false --set chance=false --set chance_recovered=[] --set options.vtp.l1=0.02
WEAKER_RUN = $(call ON_DENSE,tournament_vtp) $(WEAKER)
# Evo-ViT without any training beside a chance that draws once a stage.
UNTRAINED = --set methods=evovit --set reductions=0.35 --set training=0 --set recover={} --set chance_recovered=[] --set control=false --set options.evovit.finetune_epochs=0
UNTRAINED_RUN = $(call ON_DENSE,tournament_chance) $(UNTRAINED)
# One more seed, without any training: other draws of chance, and other calibration images where a method looks at some.
DRAWS = --set methods=patch-slimming,evit,uniform,attention,tome,ats --set reductions=0.35 --set seeds=1 --set training=0 --set recover={} --set chance_recovered=[] --set control=false
DRAWS_RUN = $(call ON_DENSE,tournament_seeds) $(DRAWS)
# Cosine labels whose skipped patches are no keys.
KEPT = --set methods=cosine --set reductions=0.35 --set control=false --set chance_recovered=[] --set options.cosine.keys=kept
KEPT_RUN = $(call ON_DENSE,tournament_kept) $(KEPT)
# The four papers' own methods at 35% where a row may spend other lengths than one pass; life and vtp spend half of it in training of their own. λ times steps stay (lesson 30b). Other LENGTHS leave other files, which lesson 30c shows; tests/test_sync.py wants them named here.
LENGTHS = 0.25 0.5
of = $(shell LC_ALL=C awk 'BEGIN { printf "%g", $(1) }')
LENGTH = --set methods=patch-slimming,cosine,life,vtp --set reductions=0.35 --set control=false --set chance=false --set chance_recovered=[] --set training=$(1) --set options.life.predictor_epochs=$(call of,$(1)/2) --set options.vtp.sparse_epochs=$(call of,$(1)/2) --set options.vtp.l1=$(call of,0.04/$(1))
LENGTH_RUN = $(call ON_DENSE,tournament_$(1)_passes) $(LENGTH)
tournament-asked:
	@test -n "$(CIFAR100)" -a -n "$(WEIGHTS)" || { echo "make tournament: say where the images and the weights are, CIFAR100=FOLDER WEIGHTS=FILE (data/README.md)" >&2; exit 2; }
tournament: tournament-asked $(DEV)
	$(if $(DENSE),,$(BIN)/python -m vitprune_nb.evidence.dense --data $(CIFAR100) --weights $(WEIGHTS))
	$(call recipe,1e-4,--weights $(WEIGHTS))
	$(call recipe,5e-5,$(HELD_OUT))
	$(call recipe,2e-4,$(HELD_OUT))
	$(call gates,0.04)
	$(call gates,0.02)
	$(call anew,tournament_vtp,data/results/tournament_vtp.csv data/results/tournament_vtp_pairs.csv data/results/tournament_vtp_answers.csv,$(WEAKER_RUN))
	$(call anew,tournament,data/results/tournament.csv data/results/tournament_pairs.csv data/results/tournament_answers.csv,$(TOURNAMENT))
	$(call anew,tournament_chance,data/results/tournament_chance*.csv,$(UNTRAINED_RUN))
	$(call anew,tournament_seeds,data/results/tournament_seeds*.csv,$(DRAWS_RUN))
	$(call anew,tournament_kept,data/results/tournament_kept*.csv,$(KEPT_RUN))
	$(foreach t,$(LENGTHS),$(call anew,tournament_$(t)_passes,data/results/tournament_$(t)_passes*.csv,$(call LENGTH_RUN,$(t))) &&) true
	$(BIN)/python tests/readme.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache _proc _docs
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 or newer found; install python3.11, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Making $(VENV) with $(PYTHON); the first install fetches PyTorch (several GB on Linux) and takes minutes."
	$(PYTHON) -m venv $(VENV)

$(RUN): settings.ini setup.py | $(BIN)/python
	$(PIP) install -e .
	@touch $@

$(DEV): settings.ini setup.py | $(BIN)/python
	$(PIP) install -e '.[dev]'
	@touch $@ $(RUN)

$(OLDEST)/.installed: settings.ini | $(BIN)/python
	rm -rf $(OLDEST)
	$(PIP) install --no-deps --target $(OLDEST) timm==$(TIMM)
	@touch $@
