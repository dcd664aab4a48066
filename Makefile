# `make` lists what there is. Every target installs what it needs first.
#
#   make PYTHON=python3.12 demo       build .venv from another Python (3.11 or newer)
#   make BIN=/path/to/venv/bin demo   use an environment that is there already, and install nothing
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
#                                     on Linux without a GPU: torch's small CPU build

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python run.py
STAMP  := $(if $(filter command,$(firstword $(origin BIN))),,$(VENV)/.installed)

# The two models of tables and figures: pocket, small, ratplus_7b or olmo2_7b (conf/pair). SET takes
# further settings, for instance SET='data.examples=200 seed=0'.
PAIR  := pocket
SET   :=
SWEEP  = $(RUN) experiment=$@ pair=$(PAIR) $(SET)
POCKET := outputs/reference/pocket

# What `make weights` runs, one conf/experiment/<name>.yaml each.
WEIGHTS := $(foreach part,scratch_% %_sft %_sft_long %_sft_last %_sft_end, \
  $(foreach backbone,attention ratplus,pocket_$(subst %,$(backbone),$(part))))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint weights ship clean bench bench-cpu

help: ## list these targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed ## create .venv and install the pinned versions into it
	@echo "Installed in $(VENV)."

demo: $(STAMP) ## the main job: Quest at budget 1/16 on both pocket models
	$(RUN) -m model=pocket_attention,pocket_ratplus method=quest budget=1/16 $(SET)

test: $(STAMP) ## the fast tests, on every core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: $(STAMP) ## the slow tests, on a CPU
	$(BIN)/python -m pytest -q -m 'slow and not gpu' --timeout=1800

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

weights: $(STAMP) ## train the pocket pair again and ship it (hours; resumes)
	set -e; for name in $(WEIGHTS); do $(RUN) experiment=$$name; done
	$(MAKE) ship

ship: $(STAMP) ## put the pair of outputs/training in the place of the shipped one
	@set -e; for name in $(WEIGHTS); do \
	  log=$(POCKET)/training/$$name; mkdir -p $$log; \
	  cp outputs/training/$$name/log.jsonl outputs/training/$$name/provenance.json $$log; done
	@set -e; for backbone in attention ratplus; do \
	  model=$(POCKET)/models/$$backbone; conf=conf/model/pocket_$$backbone.yaml; \
	  cp outputs/training/pocket_$${backbone}_sft_end/model/* $$model; \
	  digest=$$(openssl dgst -sha256 -r $$model/model.safetensors | cut -d' ' -f1); \
	  sed "s/^sha256: .*/sha256: $$digest/" $$conf > $$conf.new; mv $$conf.new $$conf; \
	  echo "$$model has sha256 $$digest"; done

clean: ## remove caches and build products; .venv and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is not Python 3.11 or newer; name one: make install PYTHON=python3.11" >&2; \
	    exit 1; }; \
	  echo "Creating $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV) (torch is the large one; this takes a few minutes)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# In processes of their own, since an error on a GPU may spoil all that comes after it.
bench: $(STAMP) ## measure kernels and models on the GPU, into outputs/bench/<device>
	for part in scan sparse models plans; do $(BIN)/python -m ratplus_bench --only $$part || exit; done

bench-cpu: $(STAMP) ## measure the forms of the memory scan on one CPU thread
	OMP_NUM_THREADS=1 $(BIN)/python -m ratplus_bench --cpu

# Each runs what is missing and writes what it makes to outputs/reports (docs/results.md).
.PHONY: table2 table3 table4 table5 fig1 fig2 fig3 fig4 reproduce report

table2: $(STAMP) ## Table 2: random selection, tasks with several keys, values or queries
	$(SWEEP)

table3: $(STAMP) ## Table 3: Quest, MoBA and SnapKV at all budgets and block sizes
	$(SWEEP)

table4: $(STAMP) ## Table 4: Table 3's settings on OLMo2-7B (PAIR=olmo2_7b)
	$(SWEEP)

table5: $(STAMP) ## Table 5: random selection, five seeds; oracle and top-k beside it
	$(SWEEP)

fig1: $(STAMP) ## Figure 1: accuracy against the budget
	$(SWEEP)

fig2: $(STAMP) ## Figure 2: hit rates of Quest's heads
	$(SWEEP)

fig3: $(STAMP) ## Figure 3: hit rates of SnapKV's heads
	$(SWEEP)

fig4: $(STAMP) ## Figure 4: hit rates by task
	$(SWEEP)

reproduce: $(STAMP) ## all tables, all figures and the report; PAIR=pocket on two cores
	$(SWEEP)

report: $(STAMP) ## the report of what is there, without running anything
	$(RUN) stage=report pair=$(PAIR) stage.folder=outputs/reports/$(PAIR) $(SET)

# The small tier; DRY=1 cuts everything down by conf/experiment/small_trial*.yaml. SET is for what
# trainings and tables share, for instance SET=tracking=disabled.
comma := ,
TABLES = $(if $(DRY),[$(1)$(comma)small_trial],$(1))
TRAIN  = $(RUN) -m experiment=$(if $(DRY),[$(1)$(comma)small_trial_training],$(1)) $(SET)
DRILLS = $(if $(DRY),stage.drill_tokens=1024)
VARIANTS := small_ratplus_gates,small_ratplus_keys,small_ratplus_values

.PHONY: small small-models ablation
small-models: $(STAMP)
	$(call TRAIN,small_ratplus) $(DRILLS)
	$(call TRAIN,small_attention) $(DRILLS)
	$(call TRAIN,small_sft) model=small_ratplus,small_attention

small: small-models ## the small tier on one GPU, from nothing to the report (resumes; DRY=1: a trial)
	$(RUN) experiment=$(call TABLES,reproduce) pair=small $(SET)

ablation: small-models ## the small pair and variants of its RAT+ at one budget (resumes; DRY=1: a trial)
	$(call TRAIN,small_ratplus) model=$(VARIANTS) $(DRILLS)
	$(call TRAIN,small_attention) model=small_ratplus_no_joint $(DRILLS)
	$(call TRAIN,small_sft) model=$(VARIANTS),small_ratplus_no_joint
	$(RUN) experiment=$(call TABLES,small_ablation) $(SET)
