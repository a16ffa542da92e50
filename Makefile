PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TINY := tests/tiny
DEMO := demo
TRAIN_SEED ?= 0
IMAGE_SEED ?= 0
TRAIN_FLAGS ?=
EVALUATE_FLAGS ?=
SOURCES := *.py tests
PROSE := *.md docs Makefile pyproject.toml .ci .github
UPSTREAM := relabel_pickapic.py train_smpo_sd15.py train_smpo_sdxl.py evaluate_smpo.py requirements.txt \
	tests/upstream/README.md tests/upstream/test_smpo_diffusion.py
DEST ?=

.PHONY: install demo test test-slow rounds quality style fix-copies upstream gpu clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt tests/requirements.txt tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt -r tests/requirements.txt -c tests/constraints.txt
	touch $@

# The demo shows its own progress and errors, not what the libraries say besides.
demo: export TRANSFORMERS_VERBOSITY = error
demo: export DIFFUSERS_VERBOSITY = error
demo: export DATASETS_VERBOSITY = error
demo: export HF_HUB_DISABLE_PROGRESS_BARS = 1
demo: export TQDM_DISABLE = 1
demo: export HF_DATASETS_DISABLE_PROGRESS_BARS = 1
demo: export PYTHONWARNINGS = ignore
demo: install  ## labels, training and verdict on the tiny model of tests/tiny
	@rm -rf $(DEMO)
	@printf '\n== Labels: a tiny reward model scores the images of 590 training pairs ==\n\n'
	$(BIN)/python relabel_pickapic.py --dataset_name $(TINY)/pairs --split train \
		--reward_model $(TINY)/pickscore --output_path $(DEMO)/labels.parquet
	@printf '\n== Training: 16 steps of 96 pairs on a tiny Stable Diffusion 1.5 ==\n\n'
	$(BIN)/python train_smpo_sd15.py --mixed_precision no \
		--pretrained_model_name_or_path $(TINY)/sd15 --dataset_name $(TINY)/pairs \
		--labels_path $(DEMO)/labels.parquet --output_dir $(DEMO)/smpo --resolution 64 --no_hflip \
		--train_batch_size 16 --gradient_accumulation_steps 6 --max_train_steps 16 --learning_rate 5e-5 \
		--lr_warmup_steps 3 --beta_dpo 200 --checkpointing_steps 16 \
		--seed $(TRAIN_SEED) $(TRAIN_FLAGS)
	@printf '\n== Verdict: base and tuned model draw 64 held-out prompts, four images each ==\n\n'
	$(BIN)/python evaluate_smpo.py --pretrained_model_name_or_path $(TINY)/sd15 --models smpo=$(DEMO)/smpo \
		--prompts_path $(TINY)/pairs/test.parquet --reward_model $(TINY)/pickscore --resolution 64 \
		--num_images_per_prompt 4 --num_inference_steps 25 --guidance_scale 1 --batch_size 64 \
		--seed $(IMAGE_SEED) --output_dir $(DEMO)/evaluation $(EVALUATE_FLAGS)

# With the least capable kernels that PyTorch has: a test that leans on those of one processor fails here or there.
test: export ATEN_CPU_CAPABILITY ?= default
test: export ONEDNN_MAX_CPU_ISA ?= AVX2
test: install
	$(BIN)/python -m pytest

test-slow: install  ## the same, with every run killed twenty times, and the slowest cases
	$(BIN)/python -m pytest --slow

rounds: install  ## three rounds of drawing and training on the tiny model, against one offline run
	$(BIN)/python tests/ablation/rounds.py
	$(BIN)/python tests/ablation/make_tables.py

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell --check-hidden $(PROSE) $(SOURCES)

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

fix-copies: install  ## copy what the scripts share from the first that has it into the others
	$(BIN)/python tests/test_siblings.py

upstream:  ## the folder smpo_diffusion in DEST, examples/research_projects of the diffusers repository
	@test -n "$(DEST)" || { echo "Give DEST=FOLDER, where the folder smpo_diffusion is to be."; exit 2; }
	mkdir -p "$(DEST)/smpo_diffusion"
	cp $(UPSTREAM) "$(DEST)/smpo_diffusion"

# With the Python of $(VENV) if there is one, or else the machine's: a GPU may have no network to install from.
gpu:  ## whatever a GPU decides, into the folder OUT, going on where it stopped; with TINY=1 in miniature, on a CPU too
	@test -n "$(OUT)" || { echo "Give OUT=FOLDER, where the results are to be."; exit 2; }
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tests/benchmarks/run_gpu.py "$(OUT)" $(if $(filter 1,$(TINY)),--tiny)

clean:
	rm -rf $(DEMO)
