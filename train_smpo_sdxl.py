#!/usr/bin/env python
# coding=utf-8
# Copyright 2026 The SmPO-Diffusion reference implementation authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# /// script
# dependencies = [
#     "torch>=2.6",
#     "diffusers>=0.35.0",
#     "transformers>=4.55.0",
#     "accelerate>=1.9.0",
#     "datasets>=3.6.0",
#     "peft>=0.17.0",
#     "pyarrow>=17.0",
#     "pillow>=10.1",
#     "tensorboard",
# ]
# ///
"""Fine-tunes Stable Diffusion XL on preference pairs with SmPO-Diffusion (ICML 2025,
https://arxiv.org/abs/2506.02698).

    accelerate launch train_smpo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --dataset_name PICKAPIC_V2 --labels_path labels.parquet --output_dir smpo-sdxl \
        --mixed_precision fp16 --gradient_checkpointing --train_batch_size 4 --gradient_accumulation_steps 32 \
        --lr_warmup_steps 100 --max_train_steps 200

on 8 GPUs has the published hyper-parameters, 1024 pairs a step for 200 steps. relabel_pickapic.py writes
`labels.parquet`.

Diffusion-DPO adds the same random noise to both images of a pair, and trains the policy to denoise the preferred one
better, relative to a reference, than the other. SmPO finds the noise by inverting each image with the policy itself,
and a pair weighs as much as a reward model is sure of it. The inversion is that of the authors' released code, from
which the published models came; the paper's, DDIM moves and a ReNoise correction at t, is `--noising renoise`.

    here           in the paper, or by formula
    x_0            clean latents, scaled                                        [N, 4, h, w]
    t, x_t         timestep in 0..T-1 and latents there
    alpha_bar      cumulative product of 1 - beta, one entry a timestep         [T]
    eps            noise predicted by a UNet
    tau            noise implied by a pair: (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)
    p_0            P(image 0 is preferred), column `soft_label_0`; alpha is gamma times that of the preferred image
    beta, gamma    strength of the pull to the reference; sensitivity to the label

A batch of B pairs is 2B images: image 0 of every pair, then image 1 of every pair.

Where this parts from the authors' released code, on purpose:

 1. Every pair of a micro-batch has its own t and label; theirs uses the first pair's for all.
 2. alpha_bar is never held in half precision, where sqrt(1 - alpha_bar) is off by 7 % at t = 0 and 1.
 3. The two images of a pair share one flip.
 4. A pair that cannot be read is replaced by the next one and counted; the others stay in step.
 5. Every random draw is seeded by (seed, epoch, row), with --streaming by (seed, epoch, process, number of the pair).
 6. Resuming is asked for, never silent, and goes on with the same run or not at all, from checkpoints that are whole.
"""

import argparse
import atexit
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import MethodType


# ---- Command line ---------------------------------------------------------------------------------------------------

RELEASED_LEVELS = 10  # of the authors' script, its --num_inversion_steps
NUM_INVERSION_STEPS = 9  # of "renoise" and "ddim": the paper's; 19 was a little better there at twice the cost
RENOISE_AT = "last_move"  # "few-step DDIM inversion, then one correction at x_t"
LABEL_KEYS = ["image_0_uid", "image_1_uid", "ranking_id"]  # the columns of a labels file that name a pair
DATASET_ACCEPTED = "a Hub name, a folder, or a Parquet file or glob; `Dataset.to_parquet` writes one"
LORA_LAYERS = "to_k,to_q,to_v,to_out.0"
MAX_VALIDATION_PROMPTS = 32  # in a picture
LOCK_FILE = ".lock"


class UserError(ValueError):
    """A mistake of the user's; its text says what was found, what is accepted, and what to do."""

    def __init__(self, text):
        super().__init__(re.sub("://[^/@ ]*@", "://", text))  # no user and password of a URL


@contextmanager
def short_errors():
    """Ends the program with the text of a `UserError` alone, without a traceback, and with exit code 2."""
    try:
        yield
    except UserError as error:
        text = str(error).rpartition("UserError: ")[2].strip()  # a data loading process puts its traceback before it
        print(f"{Path(__file__).name}: {text}", file=sys.stderr)
        sys.exit(2)


def step_of(checkpoint):
    """The optimiser step of a folder named `checkpoint-STEP`."""
    return int(Path(checkpoint).name.split("-")[1])


def find_checkpoints(output_dir):
    """The complete checkpoints of an output folder, folders named `checkpoint-STEP`, oldest first."""
    found = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


def checked(kind, fits, accepted):
    """An argparse type: a number of a kind that fits, or else an error that says what is accepted."""

    def parse(text):
        try:
            if math.isfinite(float(text)) and fits(kind(text)):
                return kind(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {accepted}, got {text}")

    return parse


int_from_1 = checked(int, lambda value: value > 0, "a whole number above 0")
int_from_0 = checked(int, lambda value: 0 <= value < 2**63, "a whole number, 0 or more, of 63 bits")
above_0 = checked(float, lambda value: value > 0, "a number above 0")
from_0 = checked(float, lambda value: value >= 0, "a number, 0 or more")
below_1 = checked(float, lambda value: 0 <= value < 1, "in [0, 1)")
up_to_1 = checked(float, lambda value: 0 <= value <= 1, "in [0, 1]")
multiple_of_8 = checked(int, lambda value: value > 0 and value % 8 == 0, "a multiple of 8, the VAE's factor")


def nonempty(text):
    """An argparse type: a text that is not empty, with ~ for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: is the variable set that it comes from?")
    return os.path.expanduser(text)


def is_share(validation_split):
    """Whether a --validation_split is a share of the training pairs, such as 0.02, and not a split with a name."""
    return bool(re.fullmatch(r"0?\.\d+", validation_split or ""))


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description="Fine-tunes Stable Diffusion XL with SmPO-Diffusion.", usage="%(prog)s FLAGS (--help lists them)"
    )
    yes = {"action": "store_true"}

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, type=nonempty, help="Base model: a Hub name or a folder.")
    add("--revision", type=nonempty, help="Revision of the base model on the Hub.")
    add("--variant", type=nonempty, help='Variant of the base model\'s weight files, for example "fp16".')
    add("--pretrained_unet_model_name_or_path", type=nonempty, help="UNet to start from, say a fine-tuned one.")
    add("--pretrained_vae_model_name_or_path", type=nonempty, help="VAE to use, say sdxl-vae-fp16-fix.")
    add("--rank", type=int_from_1, help="Train a LoRA of this rank. Default: all weights of the UNet.")
    add("--lora_alpha", type=int_from_1, help="LoRA scale numerator. Default: the rank.")
    add("--lora_layers", type=nonempty, help=f"Comma-separated modules that get a LoRA. Default: {LORA_LAYERS}.")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", required=True, type=nonempty, help=f"Data set: {DATASET_ACCEPTED}.")
    add("--dataset_split_name", "--split", type=nonempty, default="train", help="Split of the data set.")
    add("--streaming", **yes, help="Read Parquet files where they lie, on a disk or on the Hub, without a copy.")
    add("--labels_path", nargs="+", type=nonempty, help="Labels files of relabel_pickapic.py, joined by keys.")
    add("--label_column", default="soft_label_0", help="P(image 0 is preferred), in the labels or the data.")
    add("--image_columns", nargs=2, default=["jpg_0", "jpg_1"], help="Encoded bytes, or a `datasets.Image`.")
    add("--caption_column", default="caption", help="Prompt of the images.")
    add("--key_columns", nargs="+", default=LABEL_KEYS, help="What names images 0 and 1, and the comparison if known.")
    add("--human_label_column", default="label_0", help="In {0, 0.5, 1}; training leaves ties out. May be missing.")
    add("--max_train_samples", type=int_from_1, help="Train on this many pairs, drawn with --seed.")
    add("--resolution", type=multiple_of_8, default=1024, help="Side of the square images, in pixels.")
    add("--no_hflip", **yes, help="Never mirror. Otherwise half of the pairs are.")
    add("--proportion_empty_prompts", type=up_to_1, default=0.2, help="Share of prompts to empty. Published: 0.2.")
    add("--dataloader_num_workers", type=int_from_0, help="Default: with a GPU as many as cores, 8 at most.")

    add = parser.add_argument_group("method").add_argument
    ways = ["released", "renoise", "ddim", "forward"]  # the authors' code, their text, its ablation, Diffusion-DPO
    add("--noising", default="released", choices=ways, help="How x_t is reached; renoise: as the paper describes it.")
    add("--num_inversion_steps", type=int_from_1, help="n, levels or moves. Default: released 5, SDXL 10; others 9.")
    add("--renoise_at", choices=["last_move", "every_move"], help=f"Which moves are corrected. Default: {RENOISE_AT}.")
    add("--beta_dpo", type=above_0, default=5000, help="beta, pull to the reference. Published: 2000, SDXL 5000.")
    add("--gamma", type=above_0, default=10, help="gamma, sensitivity to the label. Published: 10. Hard labels: 1.")
    add = parser.add_argument_group("optimisation", "Published: 1024 pairs a step on 8 GPUs, 200 steps").add_argument
    add("--seed", type=int_from_0, default=0, help="Seed of data order, timesteps and noise.")
    add("--train_batch_size", type=int_from_1, default=4, help="Pairs per process and micro-batch.")
    add("--gradient_accumulation_steps", type=int_from_1, default=1, help="Micro-batches per optimiser step.")
    add("--num_train_epochs", type=int_from_1, default=1, help="Ignored if --max_train_steps is given.")
    add("--max_train_steps", type=int_from_1, help="Optimiser steps.")
    add("--learning_rate", type=above_0, help="Default: 1e-8 times the pairs of a step, as published.")
    schedules = ["linear", "cosine", "constant", "constant_with_warmup"]
    add("--lr_scheduler", default="constant_with_warmup", choices=schedules, help="Over optimiser steps.")
    add("--lr_warmup_steps", type=int_from_0, default=0, help="Warm-up, in optimiser steps. Published: 100.")
    add("--optimizer", default="adafactor", choices=["adamw", "adafactor"], help="Published: AdamW; SDXL: Adafactor.")
    add("--use_8bit_adam", **yes, help="AdamW with 8-bit state, from bitsandbytes.")
    add("--adam_beta1", type=below_1, default=0.9, help="AdamW only.")
    add("--adam_beta2", type=below_1, default=0.999, help="AdamW only.")
    add("--adam_weight_decay", type=from_0, default=1e-2, help="Weight decay of either optimiser.")
    add("--adam_epsilon", type=above_0, default=1e-8, help="AdamW only.")
    add("--max_grad_norm", type=above_0, default=1.0, help="Gradients are clipped to this norm.")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's. Trained weights are fp32.")
    add("--inversion_batch_size", type=int_from_1, default=4, help="Pairs inverted together: more is faster.")
    add("--gradient_checkpointing", **yes, help="Less memory for a third more compute.")
    add("--offload", **yes, help="Keep VAE, text encoders and reference on the CPU while they are not in use.")
    add("--allow_tf32", **yes, help="TF32 matrix products, as convolutions in fp32 always have, on Ampere and later.")

    add = parser.add_argument_group("logging and validation").add_argument
    trackers = ["tensorboard", "wandb", "trackio", "all", "none"]
    add("--report_to", default="tensorboard", choices=trackers, help="Where metrics and pictures go.")
    add("--validation_split", type=nonempty, help="Held-out pairs: a split, or a share of the pairs such as 0.02.")
    add("--validation_prompts", type=nonempty, nargs="+", help="Prompts to draw, or a .txt file with a prompt a line.")
    add("--num_validation_images", type=int_from_1, default=2, help="Images per validation prompt.")
    add("--validation_steps", type=int_from_1, default=50, help="Validate every so many optimiser steps.")
    add("--validation_inference_steps", type=int_from_1, default=50, help="Denoising steps of validation images.")

    add = parser.add_argument_group("checkpoints and output").add_argument
    add("--output_dir", required=True, type=nonempty, help="Where checkpoints, logs and the final model go.")
    add("--checkpointing_steps", type=int_from_1, default=50, help="Save every so many steps, and the last.")
    add("--checkpoints_total_limit", type=int_from_1, help="Keep the newest so many checkpoints.")
    add("--resume_from_checkpoint", type=nonempty, help='Folder to go on from, or "latest", if any.')
    add("--push_to_hub", **yes, help="Upload model, card and pictures; a new repository is private.")
    add("--hub_public", **yes, help="Upload to a public one.")
    add("--hub_model_id", help="Repository to upload to. Default: the name of --output_dir.")
    return resolve(parser.parse_args(input_args))


# (flag, what it needs, whether that is so)
NEEDS = [
    ("revision", "a base model on the Hub", lambda args: not Path(args.pretrained_model_name_or_path).exists()),
    ("lora_alpha", "--rank", lambda args: args.rank),
    ("lora_layers", "--rank", lambda args: args.rank),
    ("hub_model_id", "--push_to_hub", lambda args: args.push_to_hub),
    ("hub_public", "--push_to_hub", lambda args: args.push_to_hub),
    ("renoise_at", "--noising renoise", lambda args: args.noising == "renoise"),
    ("num_inversion_steps", "another --noising than forward", lambda args: args.noising != "forward"),
    ("dataloader_num_workers", "data that are copied", lambda args: args.validation_split or not args.streaming),
    ("use_8bit_adam", "--optimizer adamw", lambda args: args.optimizer == "adamw"),
    ("lr_warmup_steps", "another --lr_scheduler than constant", lambda args: args.lr_scheduler != "constant"),
]


def resolve(args):
    """The command line with everything filled in that depends on other flags; the only place that changes it. A
    `UserError` has every problem that the flags alone show, one a line, before anything is loaded."""
    problems = [
        f"--{flag} does nothing without {needed}: give both, or leave it out."
        for flag, needed, holds in NEEDS
        if getattr(args, flag) and not holds(args)
    ]
    if args.image_columns[0] == args.image_columns[1]:
        problems.append(f"--image_columns takes two different columns, got {' '.join(args.image_columns)}.")
    if len(args.key_columns) not in (2, 3):
        problems.append(f"--key_columns takes 2 or 3 columns, got {' '.join(args.key_columns)}.")
    if args.streaming and is_share(args.validation_split):
        problems.append("--validation_split with a share does not go with --streaming: name a split.")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        problems.append("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    if args.report_to not in ("all", "none") and importlib.util.find_spec(args.report_to) is None:
        problems.append(f"--report_to {args.report_to} is not installed: pip install -U accelerate {args.report_to}.")
    for file in args.labels_path or []:
        if not Path(file).is_file():
            problems.append(f"--labels_path {file} is not a file: write it with relabel_pickapic.py.")
    if len(args.validation_prompts or []) == 1 and args.validation_prompts[0].endswith((".txt", ".text")):
        file = args.validation_prompts[0]
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
            args.validation_prompts = [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--validation_prompts {file} is no text file in UTF-8 with a prompt a line: {error}.")
        if not args.validation_prompts:
            problems.append(f"--validation_prompts {file} has no prompts.")
    elif files := [prompt for prompt in args.validation_prompts or [] if os.path.isfile(prompt)]:
        problems.append(f"--validation_prompts takes prompts, or one .txt file of them, and {files[0]} is a file.")
    if len(args.validation_prompts or []) > MAX_VALIDATION_PROMPTS:
        found = f"{len(args.validation_prompts)} prompts, more than {MAX_VALIDATION_PROMPTS} for a picture"
        problems.append(f"--validation_prompts has {found}: give fewer; evaluate_smpo.py draws many.")

    checkpoints, asked, folder = find_checkpoints(args.output_dir), args.resume_from_checkpoint, args.output_dir
    found = sorted(path.name for path in Path(args.output_dir).glob("*") if path.name != LOCK_FILE)
    if asked is None and found:
        advice = "give --resume_from_checkpoint latest to go on with its run, or another folder"
        problems.append(f"--output_dir {folder} is not empty, it holds {', '.join(found[:5])}: {advice}.")
    elif asked == "latest":
        args.resume_from_checkpoint = str(checkpoints[-1]) if checkpoints else None
    elif asked is not None and Path(asked) not in find_checkpoints(Path(asked).parent):
        problems.append(f"--resume_from_checkpoint {asked} is not an existing folder named checkpoint-STEP.")
    elif asked is not None and checkpoints and step_of(checkpoints[-1]) > step_of(asked):
        newest, advice = checkpoints[-1].name, "give another --output_dir, or move the newer ones away"
        problems.append(f"--resume_from_checkpoint {asked} is older than {newest} in --output_dir {folder}: {advice}.")
    if problems:
        raise UserError("\n".join(problems))

    if args.rank is not None:
        args.lora_alpha = args.lora_alpha or args.rank
        args.lora_layers = args.lora_layers or LORA_LAYERS
    if args.noising != "forward":
        usual = RELEASED_LEVELS if args.noising == "released" else NUM_INVERSION_STEPS
        args.num_inversion_steps = args.num_inversion_steps or usual
    if args.noising == "renoise":
        args.renoise_at = args.renoise_at or RENOISE_AT
    return args


# Here, so that a mistake in a flag is told before the imports below, which take seconds.
# ruff: noqa: E402
if __name__ == "__main__":
    with short_errors():
        ARGS = parse_args()


import accelerate
import datasets
import numpy as np
import pandas as pd
import peft
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, convert_outputs_to_fp32, gather_object
from datasets import load_dataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node
from filelock import FileLock, Timeout
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from tqdm.auto import tqdm

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, free_memory, offload_models
from diffusers.utils import check_min_version, is_accelerate_version


check_min_version("0.35.0")

logger = get_logger(__name__)

# In which this script differs from its sibling, besides `encode_prompts`, `call_unet` and some defaults.
PIPELINE = StableDiffusionXLPipeline
PIPELINE_OPTIONS = {"add_watermarker": False}  # of validation
TOKENIZERS, TEXT_ENCODERS = ["tokenizer", "tokenizer_2"], ["text_encoder", "text_encoder_2"]
ADDITION_EMBED_TYPE = "text_time"
ACCEPTED_MODELS = "SDXL base models and those made from them, not its refiner; for SD1.5 there is train_smpo_sd15.py"
MODEL_LICENSE, MODEL_TAG = "openrail++", "stable-diffusion-xl"
VAE_BATCH_SIZE = 1  # images
VAE_MAY_OVERFLOW = True  # in half precision, where its configuration says `force_upcast`

IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow would also start Ghostscript for PostScript
MAX_PIXELS, MAX_ASPECT = 50_000_000, 100  # of an image; a small file can hold more than memory does
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
KOHYA_LORA_FILE = "pytorch_lora_weights_kohya.safetensors"  # for ComfyUI and A1111
MIXED_ROW_GROUPS, STREAM_ROWS, READ_AHEAD = 16, 16, 32  # of streamed data: in turns, rows at a time, pairs in advance
STOP_SIGNALS = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal with a checkpoint saved, to be started again
RECORD_FILE = "training_args.json"
NUM_VALIDATION_PAIRS = 256
THUMBNAIL = 256  # width in pixels of an image in a picture of many
MAX_BAD_SHARE, MIN_BAD_PAIRS = 0.1, 10  # a run stops if more of the drawn pairs, and more than these, cannot be read
MAX_BAD_IN_A_ROW = 10_000  # which a broken file of many rows may have
MAX_NONFINITE_STEPS = 20  # in a row; fp16 takes some to find its scale
# A resumed run has these in common with its start, besides what `record_of_run` knows of data and machine.
SAME_RUN = """
    pretrained_model_name_or_path revision variant pretrained_unet_model_name_or_path pretrained_vae_model_name_or_path
    rank lora_alpha lora_layers image_columns caption_column label_column human_label_column resolution no_hflip
    proportion_empty_prompts streaming noising num_inversion_steps renoise_at beta_dpo gamma seed train_batch_size
    inversion_batch_size gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps optimizer use_8bit_adam
    adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
""".split()


# ---- The maths: pure functions of tensors ---------------------------------------------------------------------------


def per_sample(values, x):
    """`values`, a number or `[N]`, in a shape to multiply `x` `[N, ...]` with, and never in less than float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = torch.as_tensor(values, dtype=dtype, device=x.device)
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim == 1 else values


def add_noise(x_0, noise, alpha_bar_t):
    """Forward process of DDPM, by which Diffusion-DPO (https://arxiv.org/abs/2311.12908) reaches x_t.

    `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise`, the same noise for both images of a pair. `x_0`,
    `noise` and the result are `[N, ...]`, `alpha_bar_t` is `[N]` or a number."""
    alpha_bar_t = per_sample(alpha_bar_t, x_0)
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


def ddim_move(x_s, eps, alpha_bar_s, alpha_bar_d):
    """Deterministic DDIM move from the noise level s to d, up or down (https://arxiv.org/abs/2010.02502, Eq. 12).

    `x_d = sqrt(alpha_bar_d) (x_s - sqrt(1 - alpha_bar_s) eps) / sqrt(alpha_bar_s) + sqrt(1 - alpha_bar_d) eps`

    Latents `x_s`, prediction `eps` and result are `[N, ...]`, the levels `[N]` or a number in (0, 1]; 1 is clean."""
    alpha_bar_s, alpha_bar_d = per_sample(alpha_bar_s, x_s), per_sample(alpha_bar_d, x_s)
    x_0 = (x_s - (1 - alpha_bar_s).sqrt() * eps) / alpha_bar_s.sqrt()
    return alpha_bar_d.sqrt() * x_0 + (1 - alpha_bar_d).sqrt() * eps


def inversion_timesteps(t, num_inversion_steps, num_train_timesteps):
    """Timesteps at which each sample stands before its first inversion move and after every move.

    A sample at t takes `k = ceil(n (t + 1) / T)` moves of equal length in timesteps, the last of which lands on t
    itself: small t costs few moves, `(n + 1) / 2` on average.

    Args:
        t: timestep of each sample in 0..T-1, int64 `[N]`, or else a `ValueError`.
        num_inversion_steps: n in 1..T, the moves that a sample at t = T - 1 takes.
        num_train_timesteps: T.

    Returns:
        int64 `[N, n + 1]`; column j is `(t + 1) j // k - 1`, so column 0 is -1, which stands for clean latents. A
        sample that has arrived stays at t in the columns that are left.

    >>> inversion_timesteps(torch.tensor([999, 400]), 4, 1000)
    tensor([[ -1, 249, 499, 749, 999],
            [ -1, 199, 400, 400, 400]])
    """
    if not 1 <= num_inversion_steps <= num_train_timesteps:
        raise ValueError(f"num_inversion_steps must be in 1..{num_train_timesteps}, got {num_inversion_steps}.")
    t = torch.as_tensor(t).view(-1, 1)
    if t.numel() and not 0 <= t.min() <= t.max() < num_train_timesteps:
        raise ValueError(f"t must be in 0..{num_train_timesteps - 1}, got {t.min()} to {t.max()}.")
    num_moves = (num_inversion_steps * (t + 1) + num_train_timesteps - 1) // num_train_timesteps  # ceiling, [N, 1]
    moves_done = torch.arange(num_inversion_steps + 1, device=t.device).view(1, -1)
    return (t + 1) * torch.minimum(moves_done, num_moves) // num_moves - 1


def released_timesteps(t, num_inversion_steps, num_train_timesteps):
    """The same for the authors' released code: arguments, shape and errors are those of `inversion_timesteps`.

    Its levels are `1 - S, 1, 1 + S, ...` with a stride S of T / n. A sample climbs while it is below its t, so it ends
    on the next level at or above t, or on the last one, although its result is scored as if it were at t.

    >>> released_timesteps(torch.tensor([999, 300]), 4, 1000)
    tensor([[-249,    1,  251,  501,  751],
            [-249,    1,  251,  501,  501]])
    """
    inversion_timesteps(t, num_inversion_steps, num_train_timesteps)  # raises what does not fit
    stride = num_train_timesteps // num_inversion_steps
    num_moves = ((t.view(-1, 1) - 2) // stride + 2).clamp(1, num_inversion_steps)  # levels below t
    return 1 + (torch.minimum(torch.arange(num_inversion_steps + 1), num_moves) - 1) * stride


@torch.no_grad()
def invert(predict_noise, x_0, t, alpha_bar, num_inversion_steps, noising, renoise_at):
    """Noisy latents `x_t` of `x_0`: the model's deterministic sampling run backwards, from clean latents up to t.

    "ddim" moves from clean latents up to t along `inversion_timesteps`, each move with the prediction at its source.
    "renoise" redoes a move from the same source with the prediction at its destination: one fixed-point iteration on
    the implicit step that sampling takes (ReNoise, https://arxiv.org/abs/2403.14602). "released" is what the authors'
    code does, by which the published models were trained: along `released_timesteps`, every move is redone with the
    mean of the predictions before and after it, both conditioned on its source.

    Args:
        predict_noise: `predict_noise(x, t, rows)`, the noise in latents `x` `[R, ...]` at timesteps `t` `[R]` of those
            samples that still move; `rows` `[R]` are their places in the batch, to pick their prompts by. Clean
            latents come with timestep 0, or in "released" with its negative level.
        x_0: clean latents, `[N, ...]`, float32 or float64.
        t: timestep of each sample, int64 `[N]`; on the CPU it costs no synchronisation.
        alpha_bar: cumulative alphas, `[T]`.
        num_inversion_steps: moves of a sample at the last timestep.
        noising, renoise_at: one of the three; "last_move" or "every_move", the moves that "renoise" corrects.

    Returns latents at t, like `x_0`, without gradient. A `ValueError` says which argument is none of the above.
    """
    if noising not in ("ddim", "renoise", "released"):
        raise ValueError(f'noising must be "ddim", "renoise" or "released" to invert, got {noising!r}.')
    if noising == "renoise" and renoise_at not in ("last_move", "every_move"):
        raise ValueError(f'renoise_at must be "last_move" or "every_move", got {renoise_at!r}.')
    released, corrected = noising == "released", renoise_at if noising == "renoise" else None
    grid = released_timesteps if released else inversion_timesteps
    levels = grid(t.cpu(), num_inversion_steps, len(alpha_bar))
    num_moves = (levels[:, 1:] > levels[:, :-1]).sum(dim=1)
    # Those that make most moves come first: who still moves is a slice, and nothing waits for the GPU between moves.
    order = num_moves.argsort(descending=True, stable=True)
    moving = [int((num_moves > move).sum()) for move in range(int(num_moves.max()))]
    levels, rows = levels[order].T.to(x_0.device), order.to(x_0.device)  # [n + 1, N] and [N], places in the batch
    clean = alpha_bar[:1] if released else alpha_bar.new_ones(1)
    alphas = torch.cat([clean, alpha_bar]).to(x_0.device)[levels.clamp(min=-1) + 1]  # [n + 1, N]
    x = x_0[rows]
    x_last, alpha_last = x.clone(), alphas[0].clone()  # where the last move of each starts

    for move, count in enumerate(moving):
        # Source and destination of the samples that still move, [count].
        (s, d), (alpha_s, alpha_d) = levels[move : move + 2, :count], alphas[move : move + 2, :count]
        x_s = x[:count].clone()
        eps = predict_noise(x_s, s if released else s.clamp(min=0), rows[:count])
        x_d = ddim_move(x_s, eps, alpha_s, alpha_d)
        if corrected == "every_move":
            x_d = ddim_move(x_s, predict_noise(x_d, d, rows[:count]), alpha_s, alpha_d)
        if released:
            x_d = ddim_move(x_s, (eps + predict_noise(x_d, s, rows[:count])) / 2, alpha_s, alpha_d)
        x[:count], x_last[:count], alpha_last[:count] = x_d, x_s, alpha_s
    if corrected == "last_move":  # of all samples in one call, however many moves each made
        x = ddim_move(x_last, predict_noise(x, levels[-1], rows), alpha_last, alphas[-1])
    return torch.empty_like(x).index_copy_(0, rows, x)


def implied_noise(x_0, x_t, alpha_bar_t):
    """tau, the noise that leads from `x_0` to `x_t`: `(x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)`.

    `x_0`, `x_t` and the result are `[N, ...]`, `alpha_bar_t` is `[N]` or a number below 1. It undoes `add_noise`, and
    is what both UNets are to predict in the loss (tau_t in the SmPO paper)."""
    alpha_bar_t = per_sample(alpha_bar_t, x_0)
    return (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()


def noise_from_prediction(model_pred, x_t, alpha_bar_t, prediction_type):
    """Noise that a UNet's output stands for; all are `[N, ...]`, `alpha_bar_t` is `[N]` or a number.

    A v-prediction (https://arxiv.org/abs/2202.00512) is `v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0`, so
    `eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t`.
    """
    if prediction_type == "epsilon":
        return model_pred
    alpha_bar_t = per_sample(alpha_bar_t, x_t)
    return alpha_bar_t.sqrt() * model_pred + (1 - alpha_bar_t).sqrt() * x_t


def smpo_loss(model_errors, ref_errors, soft_label_0, beta, gamma):
    """Loss of SmPO-Diffusion over B pairs: the mean of `-log sigmoid(-0.5 beta gamma (2 p_0 - 1) D)`.

    D is the policy's error less the reference's of image 0, less the same of image 1: below 0 if the policy has gained
    more on image 0. `gamma (2 p - 1)` is the paper's 2 alpha - gamma. With p_0 in {0, 1} and gamma = 1 this is
    Diffusion-DPO's loss, whose code has the same 0.5 and takes errors as means over pixels; beta 2000 and 5000 are
    stated in that convention.

    Args:
        model_errors: mean squared error of the policy's noise prediction for each image, `[2B]`, images 0 first.
        ref_errors: the same of the reference.
        soft_label_0: p_0, the probability that image 0 is preferred, `[B]`, in [0, 1].
        beta, gamma: strength of the pull to the reference, and sensitivity to the label.

    Returns the loss, and the argument of log sigmoid `[B]`. Where the policy errs less on the preferred image than the
    reference does, the loss is below log 2 = 0.693:

    >>> model_errors, ref_errors = torch.tensor([0.090, 0.110]), torch.tensor([0.100, 0.110])  # image 0, image 1
    >>> smpo_loss(model_errors, ref_errors, torch.tensor([0.55]), beta=200, gamma=10)
    (tensor(0.3133), tensor([1.]))
    """
    error_gap_0, error_gap_1 = (model_errors - ref_errors).chunk(2)
    logits = -0.5 * beta * gamma * (2 * soft_label_0 - 1) * (error_gap_0 - error_gap_1)
    return -torch.nn.functional.logsigmoid(logits).mean(), logits


# ---- One step: encode, sample t, invert, implied noise, the two errors, the loss ------------------------------------


@dataclass
class Context:
    """What a step needs besides its batch."""

    models: dict  # from `load_models`, and `ref_unet`, None in LoRA training
    alpha_bar: torch.Tensor  # fp32 [T], on the device of the models
    prediction_type: str  # "epsilon" or "v_prediction"
    autocast: Callable  # `autocast()` is the context of every UNet, policy and reference alike: both round alike
    args: argparse.Namespace


@dataclass
class MicroBatch:
    """B pairs, ready for the gradient; of 2B images the first B are image 0 of each pair."""

    x_t: torch.Tensor  # [2B, C, h, w]
    t: torch.Tensor  # int64 [2B]
    cond: dict  # for `call_unet`, tensors [2B, ...]
    tau: torch.Tensor  # [2B, C, h, w]
    ref_errors: torch.Tensor  # [2B]
    soft_label_0: torch.Tensor  # [B]


@torch.no_grad()
def invert_and_judge(batch, context):
    """The part of the paper's algorithm that has no gradient: x_t of each image, tau, and the reference's errors.

    The policy does not change within an optimiser step, so many micro-batches are encoded and inverted in one call.
    The reference's errors are then computed micro-batch by micro-batch, in the shape in which the policy's will be:
    kernels round differently in another shape, and beta times gamma magnifies that. On the tiny models a batch 16
    times as large moved the argument of log sigmoid by 1e-5 (6e-4 at most) in fp32, other kernels by 0.1 (5 at most)
    in bf16. So both models agree exactly before the first step.

    Takes P pairs, from `collate_pairs`, and returns a list of `MicroBatch`es of --train_batch_size pairs each.
    """
    models, alpha_bar, args = context.models, context.alpha_bar, context.args
    device = alpha_bar.device
    seeds_0, seeds_1, noise_seeds = zip(*batch["seeds"])
    with offload_models(models["vae"], device=device, offload=args.offload):
        x_0 = encode_images(batch["pixel_values"], models["vae"], seeds_0 + seeds_1)  # [2P, C, h, w]
    with offload_models(*(models[part] for part in TEXT_ENCODERS), device=device, offload=args.offload):
        cond = {key: torch.cat([value, value]) for key, value in encode_prompts(batch["captions"], models).items()}
    t = batch["timesteps"].repeat(2)  # [2P], on the CPU: the inversion is laid out without waiting for the GPU
    t_device = t.to(device)
    if args.noising == "forward":
        noise = seeded_noise(noise_seeds, x_0.shape[1:]).to(device)
        x_t = add_noise(x_0, torch.cat([noise, noise]), alpha_bar[t_device])
    else:

        def predict_noise(x, t, rows):
            return predict_eps(models["unet"], x, t, {key: value[rows] for key, value in cond.items()}, context)

        with context.autocast():  # which rounds a product's weights once within its outermost context
            x_t = invert(predict_noise, x_0, t, alpha_bar, args.num_inversion_steps, args.noising, args.renoise_at)
    tau = implied_noise(x_0, x_t, alpha_bar[t_device])

    soft_label_0, micro_batches = batch["soft_label_0"].to(device), []
    with reference_of(context) as reference:
        for pairs in torch.arange(len(soft_label_0), device=device).split(args.train_batch_size):
            images = torch.cat([pairs, pairs + len(soft_label_0)])
            inputs = x_t[images], t_device[images], {key: value[images] for key, value in cond.items()}
            ref_errors = squared_errors(predict_eps(reference, *inputs, context), tau[images])
            micro_batches.append(MicroBatch(*inputs, tau[images], ref_errors, soft_label_0[pairs]))
    return micro_batches


def training_step(micro_batch, context):
    """The part that has a gradient: the loss of a `MicroBatch`, and its metrics as detached scalars."""
    args = context.args
    eps = predict_eps(context.models["unet"], micro_batch.x_t, micro_batch.t, micro_batch.cond, context)
    errors = squared_errors(eps, micro_batch.tau)  # [2B]
    loss, logits = smpo_loss(errors, micro_batch.ref_errors, micro_batch.soft_label_0, args.beta_dpo, args.gamma)
    return loss, metrics_of(loss, logits, errors.detach(), micro_batch, args)


def predict_eps(unet, x_t, t, cond, context):
    """Noise fp32 `[N, C, h, w]` that a UNet sees in `x_t` `[N, C, h, w]` at `t` `[N]`."""
    with context.autocast():
        model_pred = call_unet(unet, x_t, t, cond).float()
    return noise_from_prediction(model_pred, x_t, context.alpha_bar[t.clamp(min=0)], context.prediction_type)


def squared_errors(eps, tau):
    """Mean squared error of each predicted noise, `[N]`."""
    return (eps - tau).pow(2).mean(dim=(1, 2, 3))


def seeded_noise(seeds, shape):
    """Standard normal noise `[len(seeds), *shape]`, fp32 on the CPU, row i drawn from `seeds[i]` alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encode_images(pixel_values, vae, seeds):
    """Scaled latents x_0, fp32 `[N, 4, H / 8, W / 8]`, of images, uint8 `[N, 3, H, W]`: samples of the VAE's
    posterior, each drawn with its seed."""
    batches = pixel_values.to(vae.device, non_blocking=True).split(VAE_BATCH_SIZE)
    posteriors = [vae.encode((images.float() / 127.5 - 1).to(vae.dtype)).latent_dist for images in batches]
    mean, std = (torch.cat([getattr(part, name) for part in posteriors]).float() for name in ("mean", "std"))
    return (mean + std * seeded_noise(seeds, mean.shape[1:]).to(mean.device)) * vae.config.scaling_factor


@torch.no_grad()
def metrics_of(loss, logits, model_errors, micro_batch, args):
    """What is logged of a micro-batch, each a scalar that may be averaged over micro-batches and processes.

    The implicit reward of an image is -0.5 beta (policy error - reference error). Accuracy counts the pairs whose
    preferred image (by the label) has the higher one, an exact tie as a half.
    """
    soft_label_0 = micro_batch.soft_label_0
    prefers_0 = soft_label_0 > 0.5
    (model_0, model_1), (ref_0, ref_1) = model_errors.chunk(2), micro_batch.ref_errors.chunk(2)
    sign = torch.where(prefers_0, 1.0, -1.0)
    metrics = {
        "loss": loss,
        "implicit_accuracy": ((logits > 0).float() + 0.5 * (logits == 0).float()).mean(),
        "reward_margin": (-0.5 * args.beta_dpo * sign * ((model_0 - ref_0) - (model_1 - ref_1))).mean(),
        "model_error_preferred": torch.where(prefers_0, model_0, model_1).mean(),
        "model_error_rejected": torch.where(prefers_0, model_1, model_0).mean(),
        "ref_error_preferred": torch.where(prefers_0, ref_0, ref_1).mean(),
        "ref_error_rejected": torch.where(prefers_0, ref_1, ref_0).mean(),
        "std_tau": micro_batch.tau.flatten(1).std(dim=1).mean(),
        "weight": args.gamma * (2 * soft_label_0 - 1).abs().mean(),
    }
    return {key: value.detach().float() for key, value in metrics.items()}


# ---- Models, prompts, and the seam to the UNet ----------------------------------------------------------------------


def call_unet(unet, x_t, t, cond):
    """What the UNet predicts for latents `x_t` `[N, C, h, w]` at timesteps `t` `[N]`.

    `cond` holds `encoder_hidden_states` `[N, S, D]` and `text_embeds` `[N, E]`, from `encode_prompts`. Every image
    passes for one of the resolution, uncut, as in the authors' code and as in sampling
    (https://arxiv.org/abs/2307.01952, section 2.2)."""
    height, width = (8 * side for side in x_t.shape[2:])
    time_ids = x_t.new_zeros(len(x_t), 6)  # filled on the device: a copy from the CPU would wait for it
    time_ids[:, ::4].fill_(height)
    time_ids[:, 1::4].fill_(width)
    added = {"text_embeds": cond["text_embeds"], "time_ids": time_ids}
    return unet(x_t, t, encoder_hidden_states=cond["encoder_hidden_states"], added_cond_kwargs=added).sample


@torch.no_grad()
def encode_prompts(captions, models):
    """Conditioning of a UNet for B captions, cut at the tokenizers' length: a dict of tensors whose first axis is B.

    `encoder_hidden_states` are the last hidden states but one of both text encoders side by side, `text_embeds` the
    pooled output of the second.
    """
    hidden_states = []
    for tokenizer, text_encoder in ((models[part] for part in parts) for parts in zip(TOKENIZERS, TEXT_ENCODERS)):
        input_ids = tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        output = text_encoder(input_ids.to(text_encoder.device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
    return {"encoder_hidden_states": torch.cat(hidden_states, dim=-1), "text_embeds": output.text_embeds}


@contextmanager
def reference_of(context):
    """The reference model: the frozen copy, or in LoRA training (no copy) the policy with its adapter switched off."""
    unet, ref_unet = context.models["unet"], context.models["ref_unet"]
    if ref_unet is not None:
        with offload_models(ref_unet, device=context.alpha_bar.device, offload=context.args.offload):
            yield ref_unet
        return
    adapted = unet.module if hasattr(unet, "module") else unet
    adapted.disable_adapters()
    try:
        yield unet
    finally:
        adapted.enable_adapters()


@contextmanager
def explain_errors(flag, value, accepted="a Hub name or a folder"):
    """Turns a library's complaint about what a flag names into a `UserError` with the flag and what it accepts."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a dozen types on damaged files
        reason = f"{error} ({error.__cause__})" if error.__cause__ else error
        raise UserError(f"--{flag} {value} cannot be loaded: {reason}\nAccepted: {accepted}.") from error


def load_network(part, network_class, args, dtype=None):
    """The `part` "unet" or "vae" in `dtype`, or without one only its configuration: from
    --pretrained_PART_model_name_or_path if given (a folder of its own, a pipeline or a checkpoint of this script),
    else from the base model."""
    flag, source = f"pretrained_{part}_model_name_or_path", {}
    if getattr(args, flag) is None:
        flag = "pretrained_model_name_or_path"
        source = {"revision": args.revision, "variant": args.variant, "subfolder": part}
    name = getattr(args, flag)
    with explain_errors(flag, name):
        try:
            config = network_class.load_config(name, **source)
        except OSError:
            source["subfolder"] = part
            config = network_class.load_config(name, **source)
        if config.get("_class_name") != network_class.__name__:
            raise ValueError(f"its {part} is a {config.get('_class_name')}, not a {network_class.__name__}")
        if dtype is None:
            return config
        return network_class.from_pretrained(name, torch_dtype=dtype, use_safetensors=True, **source)


def check_models(args):
    """Raises a `UserError` for models that the method or this script is not made for, before weights are loaded."""
    name = args.pretrained_model_name_or_path
    with explain_errors("pretrained_model_name_or_path", name, ACCEPTED_MODELS):
        if Path(name).is_file():
            raise ValueError(f"it is a file: `save_pretrained` of {PIPELINE.__name__}.from_single_file makes a folder")
        index = PIPELINE.load_config(name, revision=args.revision)
        missing = [part for part in [*TOKENIZERS, *TEXT_ENCODERS] if index.get(part, [None])[0] is None]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}")
    unet, vae = load_network("unet", UNet2DConditionModel, args), load_network("vae", AutoencoderKL, args)
    embeds, channels, vae_channels = unet.get("addition_embed_type"), unet["in_channels"], vae["latent_channels"]
    flag = f"pretrained_{'unet_' if args.pretrained_unet_model_name_or_path else ''}model_name_or_path"
    with explain_errors(flag, getattr(args, flag), ACCEPTED_MODELS):
        if embeds != ADDITION_EMBED_TYPE:
            raise ValueError(f"its UNet has addition_embed_type {embeds}")
        if unet.get("time_cond_proj_dim") is not None:
            raise ValueError("its UNet takes the guidance scale as an input, as a latent consistency model does")
        if unet.get("class_embed_type") or unet.get("num_class_embeds") or unet.get("encoder_hid_dim_type"):
            raise ValueError("its UNet takes more than a prompt, a class or an image")
        if channels != vae_channels:
            raise ValueError(f"its UNet takes {channels} channels and the VAE has {vae_channels}, as for inpainting")


def load_noise_schedule(args):
    """alpha_bar of the base model's scheduler, fp32 `[T]`, and its prediction type; a `UserError` if it has none."""
    name = args.pretrained_model_name_or_path
    with explain_errors("pretrained_model_name_or_path", name, "a model with a noise schedule of betas, as DDPM's"):
        config = DDPMScheduler.load_config(name, subfolder="scheduler", revision=args.revision)
        kind, prediction_type = config["_class_name"], config.get("prediction_type", "epsilon")
        if not config.get("beta_schedule") or kind.startswith("EDM"):
            raise ValueError(f"its scheduler is a {kind}")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"its scheduler says prediction_type {prediction_type}, not epsilon or v_prediction")
    alpha_bar = DDPMScheduler.from_config(config).alphas_cumprod.float()
    if (args.num_inversion_steps or 1) > len(alpha_bar):
        raise UserError(f"--num_inversion_steps must be in 1..{len(alpha_bar)}, got {args.num_inversion_steps}.")
    return alpha_bar, prediction_type


def make_pipeline(unet, args, fetched=False, **parts):
    """A pipeline of the base model with another UNet; `parts` replace further parts of it. Of one that was made before
    all is `fetched`, and the Hub, which may not answer then, is left alone."""
    name, options = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    options |= {"unet": unet, "use_safetensors": True, **parts}
    try:
        pipeline = PIPELINE.from_pretrained(name, local_files_only=fetched, **options)
    except OSError:
        if not fetched:
            raise
        pipeline = PIPELINE.from_pretrained(name, **options)  # old diffusers miss files there that nothing needs
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_models(args, device, weight_dtype):
    """The base model: VAE and text encoders frozen in `weight_dtype`, the UNet in fp32, or for LoRA like the rest.

    Returns a dict of the pipeline's parts. With --offload only the UNet stays on `device`."""
    upcast = VAE_MAY_OVERFLOW and load_network("vae", AutoencoderKL, args).get("force_upcast", True)
    unet = load_network("unet", UNet2DConditionModel, args, torch.float32 if args.rank is None else weight_dtype)
    vae = load_network("vae", AutoencoderKL, args, torch.float32 if upcast else weight_dtype)
    options = PIPELINE_OPTIONS if args.rank else {}  # a whole pipeline is written with all its parts: are they there?
    with explain_errors("pretrained_model_name_or_path", args.pretrained_model_name_or_path):
        models = make_pipeline(unet.to(device), args, vae=vae, **options).components
        models.pop("safety_checker", None)
        for part in TOKENIZERS:
            if len(models[part]) <= 2:  # start and end of a text: transformers makes it up where the files are missing
                raise ValueError(f"its {part} has no vocabulary")
    for part in TEXT_ENCODERS:
        models[part].to(weight_dtype)
    for part in ["vae", *TEXT_ENCODERS]:
        models[part].requires_grad_(False).to("cpu" if args.offload else device)
    return models


def load_reference(args, device, weight_dtype):
    """The frozen reference for full fine-tuning. In half precision the policy's weights are rounded at every use; the
    reference's are stored rounded, so that both start equal: beta would magnify a difference. Its outputs are cast to
    fp32, as accelerate casts the policy's."""
    ref_unet = load_network("unet", UNet2DConditionModel, args, weight_dtype).requires_grad_(False)
    ref_unet.forward = convert_outputs_to_fp32(ref_unet.forward)
    return ref_unet.to("cpu" if args.offload else device)


def norm_without_autocast(norm, x):
    """A group or layer norm of `x` in its precision. Autocast would have fp32 here and in what follows, though a GPU's
    kernels compute norms in fp32 either way. It saves two fifths of what a step moves in memory beside its products,
    and adds about a sixth to tau's error from half precision."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(norm, torch.nn.GroupNorm):
            return torch.nn.functional.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return torch.nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def set_up_unets(accelerator, models, weight_dtype, args):
    """Makes the UNet of `models` the policy, a LoRA in it that changes nothing yet, and adds the reference or None."""
    unet = models["unet"]
    models["ref_unet"] = load_reference(args, accelerator.device, weight_dtype) if args.rank is None else None
    if args.rank is not None:
        unet.requires_grad_(False)
        with explain_errors("lora_layers", args.lora_layers, "names of linear or convolutional modules of the UNet"):
            layers = [layer.strip() for layer in args.lora_layers.split(",")]
            options = {"init_lora_weights": "gaussian", "target_modules": layers}
            unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, **options))
            adapted = [name for name, module in unet.named_modules() if hasattr(module, "lora_A")]
            if unknown := [layer for layer in layers if not any(f".{name}".endswith(f".{layer}") for name in adapted)]:
                raise ValueError(f"the UNet has no {' and no '.join(map(repr, unknown))}")
        cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if weight_dtype == torch.float32:
        return
    for network in filter(None, (unet, models["ref_unet"])):
        for module in network.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.forward = MethodType(norm_without_autocast, module)
            elif hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = False  # to fp32, which autocast undoes
    if accelerator.distributed_type != DistributedType.FSDP and not args.use_8bit_adam:  # 8-bit AdamW undoes it
        for network in filter(None, (unet, models["ref_unet"], models["vae"])):
            network.to(memory_format=torch.channels_last)  # in which convolutions in half precision are fastest


# ---- Data: reading, labels, which pairs, tensors, order -------------------------------------------------------------


def load_data(flag, args, streaming=False, columns=None):
    """The split that --`flag` names, images left encoded, or a `UserError` if there is none.

    It is a `datasets.Dataset`, or with `streaming` a `datasets.IterableDataset` of `columns` (all by default) over
    Parquet files where they lie, a shard a row group."""
    name, split, options = args.dataset_name, getattr(args, flag), {}
    if streaming:
        if not hasattr(datasets.IterableDataset, "reshard"):
            raise UserError(f"--streaming needs datasets 5.1 or later, found {datasets.__version__}: upgrade it.")
        options = {"streaming": True, "columns": columns, "batch_size": STREAM_ROWS}
    accepted = "Parquet files, whole ones, for --streaming" if streaming else DATASET_ACCEPTED
    with explain_errors("dataset_name", f"{name} --{flag} {split}", accepted):
        if name.endswith(".parquet"):
            if flag == "validation_split":
                raise ValueError("it is one split, that of the training pairs: give data with several, or a share")
            data = load_dataset("parquet", data_files={split: name}, split=split, **options)
        elif Path(name).is_file():
            raise ValueError("it is a file, and none named .parquet: pandas converts others")
        else:
            if args.streaming and not streaming:  # without other splits, which `datasets` would copy, too
                name, files = "parquet", load_dataset_builder(name).config.data_files
                part = re.split(r"[+\[]", split)[0]  # of a slice, say test[:10%]
                if part not in files:
                    raise ValueError(f"it has the splits {', '.join(map(str, files))}")
                options["data_files"] = {part: files[part]}
            data = load_dataset(name, split=split, **options)
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        return data.reshard() if streaming else data


def read_columns(data, columns, args):
    """Columns of all rows as a DataFrame: for keys, labels and captions, not for images."""
    if isinstance(data, datasets.Dataset):
        return data.select_columns(columns).to_pandas()
    batches = load_data("dataset_split_name", args, True, columns).with_format("pandas").iter(10_000)
    return pd.concat(list(tqdm(batches, desc="Keys", unit="batch")), ignore_index=True)


def decode_image(data, side=None):
    """An RGB image of encoded bytes, or of the `{"bytes", "path"}` that a `datasets.Image` column holds.

    It is turned upright by its EXIF orientation; what is transparent becomes white; 16-bit grey becomes 8-bit; of an
    animation it is the first frame. A JPEG is decoded at a half, a quarter or an eighth of its size, which is far
    faster, where both sides stay at least `side` pixels long. A `ValueError` says that it is missing, empty, damaged,
    in another format than `IMAGE_FORMATS`, larger than `MAX_PIXELS`, beyond `MAX_ASPECT` to 1, or a path: no row may
    name a file to be read.
    """
    try:
        if isinstance(data, dict):
            data, path = data["bytes"], data["path"]
            if data is None and path is not None:
                raise ValueError(f"only a path, {Path(path).name}: `Dataset.push_to_hub` embeds images in the rows")
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if side is not None:
            image.draft(None, (side, side))
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
            limits = f"{MAX_PIXELS:,} or of more than {MAX_ASPECT} to 1"
            raise ValueError(f"{image.width} x {image.height} pixels, more than {limits}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Pillow would clip them to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged bytes, with no common base
        text = getattr(error, "strerror", None) or str(error)  # without the path of this machine
        text = re.sub(" <_io.BytesIO.*>", "", text)  # the same for the same bytes
        raise ValueError(f"not a readable image ({type(error).__name__}: {text})") from error


def join_labels(keys, split, args):
    """Labels of the --labels_path files for P pairs of a split: float64 `[P]`, NaN where the label is null.

    `keys` is a DataFrame `[P, 2 or 3]`, the values of --key_columns in the data set. A `UserError` says that a column
    is missing, that a pair has no row in the files, or that two rows of one pair contradict each other."""
    flag, label = f"--labels_path {' '.join(args.labels_path)}", args.label_column
    with explain_errors("labels_path", " ".join(args.labels_path), "whole files of relabel_pickapic.py"):
        labels = pd.concat(map(pd.read_parquet, args.labels_path), join="inner")
    columns = [key for key in LABEL_KEYS[: keys.shape[1]] if key in labels]
    if label not in labels or columns[:2] != LABEL_KEYS[:2]:
        needed, has = f"{', '.join(LABEL_KEYS[:2])} and {label}", ", ".join(labels)
        raise UserError(f"{flag} needs the columns {needed}, it has {has}: write it with relabel_pickapic.py.")
    labels = labels[[*columns, label]].astype(dict.fromkeys(columns, str)).drop_duplicates()
    doubled = labels[labels.duplicated(columns)]
    if len(doubled):
        pair = doubled.iloc[0][columns].to_dict()
        raise UserError(f"{flag} has several labels for {pair}: relabel and train with other --key_columns.")
    keys = keys.iloc[:, : len(columns)].set_axis(columns, axis=1).astype(str)
    joined = keys.merge(labels, how="left", on=columns, validate="many_to_one", indicator=True)
    unmatched = keys[joined["_merge"] == "left_only"]
    if len(unmatched):
        raise UserError(
            f"{flag} has no label for {len(unmatched)} of the {len(keys)} pairs of the split {split}; the first is row"
            f" {unmatched.index[0]}, {unmatched.iloc[0].to_dict()}. Both have to come from the same data and split."
        )
    return joined[label].to_numpy(np.float64)


@dataclass
class Pairs(torch.utils.data.Dataset):
    """K preference pairs: `pairs[epoch, index]`, of which `rows[index]` is the row in `data`.

    Everything random about a pair (mirroring, emptied prompt, timestep, noise) is drawn from (seed, epoch, row), so it
    depends neither on the batch, nor on the process, nor on where a run was resumed.
    """

    data: datasets.Dataset  # or an `IterableDataset`, with --streaming
    rows: np.ndarray  # of `data`, int64 [K]
    soft_labels_0: np.ndarray  # P(image 0 is preferred), float32 [K]
    keys: pd.DataFrame  # of the pairs, [K, 2 or 3]
    hashes: np.ndarray  # of caption and keys, uint64 [K]
    num_train_timesteps: int
    args: argparse.Namespace

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        """The pair, or the next one that can be read."""
        return first_readable(self.following(*key), len(self), self.args)

    def following(self, epoch, first):
        for place in itertools.count(first):
            index = place % len(self)
            row = int(self.rows[index])
            yield f"row {row} of the data set", self.data[row], self.soft_labels_0[index], self.draw(epoch, row)

    def draw(self, *numbers):
        """Everything random about a pair; all of it is drawn in any case, so that no flag changes the rest."""
        rng = np.random.default_rng([self.args.seed, *numbers])
        return {
            "mirror": rng.random() < 0.5 and not self.args.no_hflip,
            "empty": rng.random() < self.args.proportion_empty_prompts,
            "timestep": int(rng.integers(self.num_train_timesteps)),
            "seeds": rng.integers(2**63, size=3).tolist(),  # posterior of image 0, of image 1, forward noise
        }

    def timestep(self, key):
        return self.draw(key[0], int(self.rows[key[1]]))["timestep"]

    def subset(self, chosen):
        """The pairs of a mask or of indices `[K]`."""
        arrays = {name: getattr(self, name)[chosen] for name in ("rows", "soft_labels_0", "hashes")}
        return replace(self, keys=self.keys.iloc[chosen], **arrays)


def select_pairs(data, num_train_timesteps, args):
    """The `Pairs` worth training on, with labels from --labels_path or, without it, from a column.

    Left out are pairs without a label (their images could not be scored), pairs labelled exactly 0.5, whose gradient
    is zero, and pairs that people called a tie (`--human_label_column`). A `UserError` says that a column is missing
    or holds something else, that labels and pairs do not match, or that no pair is left."""
    flags = {"image_columns": args.image_columns, "caption_column": [args.caption_column]}
    flags |= {"key_columns": args.key_columns[:2]} if args.labels_path or args.streaming else {}
    flags |= {} if args.labels_path else {"label_column": [args.label_column]}
    named = [(flag, column) for flag, columns in flags.items() for column in columns]
    missing = [f"--{flag} {column}" for flag, column in named if column not in data.column_names]
    if missing:
        has = ", ".join(data.column_names)
        raise UserError(f"The data set has no column for {', '.join(missing)}. It has {has}: name the right ones.")
    for column in args.image_columns:
        kind = data.features[column]
        binary = getattr(kind, "dtype", None) in ("binary", "large_binary")
        if not binary and not isinstance(kind, (datasets.Image, dict)):
            raise UserError(f"--image_columns {column} has to hold encoded images, it holds {kind}.")
    key_columns = [name for name in args.key_columns if name in data.column_names]
    label_columns = [args.human_label_column] + [args.label_column] * (not args.labels_path)
    label_columns = [name for name in label_columns if name in data.column_names]
    table = read_columns(data, list(dict.fromkeys([args.caption_column, *key_columns, *label_columns])), args)
    if not table[args.caption_column].map(lambda caption: isinstance(caption, str)).any():
        raise UserError(f"--caption_column {args.caption_column} holds no texts: name the right one.")
    for column in label_columns:
        if not pd.api.types.is_numeric_dtype(table[column]):
            found = table[column].dropna().iloc[:1].tolist()
            raise UserError(f"The label column {column} has to hold numbers in [0, 1], it holds {found}.")
    if args.labels_path:
        labels = join_labels(table[key_columns], data.split or args.dataset_split_name, args)
    else:
        labels = table[args.label_column].to_numpy(np.float64)
    for row in np.flatnonzero((labels < 0) | (labels > 1))[:1]:
        raise UserError(f"--label_column {args.label_column} must be in [0, 1], or null: row {row} is {labels[row]}.")
    if args.gamma != 1 and np.isin(labels[~np.isnan(labels)], (0, 0.5, 1)).all():
        logger.warning(f"All labels are 0, 0.5 or 1: with --gamma 1, not {args.gamma:g}, the loss is Diffusion-DPO's.")
    labels = labels.astype(np.float32)
    unlabelled, undecided = np.isnan(labels), labels == 0.5
    tied = table.get(args.human_label_column, pd.Series(np.nan, table.index)).to_numpy() == 0.5
    rows = np.flatnonzero(~(unlabelled | undecided | tied))
    logger.info(
        f"{len(table)} pairs: {unlabelled.sum()} without a label, {undecided.sum()} labelled 0.5 and {tied.sum()}"
        f" human ties are left out, {len(rows)} remain."
    )
    if not len(rows):
        raise UserError(f"No pair of --dataset_name {args.dataset_name} is left to train on, see the counts above.")
    texts = [args.caption_column, *key_columns]
    data = data.select_columns(list(dict.fromkeys([*args.image_columns, *texts])))
    known = table[texts].iloc[rows].astype(object)
    known = known.where(known.notna(), "").astype(str)  # so that all versions of pandas have the same
    hashes = pd.util.hash_pandas_object(known, index=False).to_numpy()
    return Pairs(data, rows, labels[rows], table[key_columns].iloc[rows], hashes, num_train_timesteps, args)


def hold_out(pairs, args):
    """Which pairs to hold out, bool `[K]`: all of some captions, which nothing else is trained on, and at least the
    share --validation_split."""
    captions = read_columns(pairs.data, [args.caption_column], args)[args.caption_column]
    prompt_of_pair = pd.factorize(captions)[0][pairs.rows]
    prompts, counts = np.unique(prompt_of_pair, return_counts=True)
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    num_prompts = 1 + np.searchsorted(np.cumsum(counts[order]), float(args.validation_split) * len(pairs))
    return np.isin(prompt_of_pair, prompts[order[:num_prompts]])


def load_pairs(accelerator, num_train_timesteps, args):
    """The `Pairs` to train on, and those to validate on or None; a `UserError` if they are too few."""

    def load(flag, streaming=False):
        with accelerator.main_process_first():
            data = load_data(flag, args, streaming)
        return select_pairs(data, num_train_timesteps, args)

    pairs, held_out = load("dataset_split_name", args.streaming), None
    if is_share(args.validation_split):
        chosen = hold_out(pairs, args)
        if chosen.all():
            problem = f"--validation_split {args.validation_split} holds out captions as a whole, which here are all"
            raise UserError(f"{problem}: leave it out, or name another split.")
        held_out, pairs = pairs.subset(chosen), pairs.subset(~chosen)
    elif args.validation_split is not None:
        held_out = load("validation_split")
    if args.max_train_samples is not None:
        chosen = np.random.default_rng(args.seed).permutation(len(pairs))[: args.max_train_samples]
        pairs = pairs.subset(np.sort(chosen))
    batch = f"--train_batch_size {args.train_batch_size} on {accelerator.num_processes} processes"
    needed = args.train_batch_size * accelerator.num_processes
    for name, some in (("the data set", pairs), (f"--validation_split {args.validation_split}", held_out)):
        if some is not None and len(some) < needed:
            raise UserError(f"{batch} needs {needed} pairs, and {name} has {len(some)}: use a smaller batch.")
    return pairs, held_out


def prepare_pair(pair, soft_label_0, drawn, args):
    """A row of the data set as tensors, or a `ValueError` if its caption is no text or an image cannot be read."""
    caption, size = pair[args.caption_column], args.resolution
    if not isinstance(caption, str):
        raise ValueError(f"{args.caption_column} is {type(caption).__name__}, not a text")
    # A JPEG twice as large as needed has as much detail after `cut_square` as the whole one.
    images = [decode_image(pair[column], 2 * size) for column in args.image_columns]
    if 2 * min(min(image.size) for image in images) < size:
        warnings.warn(f"Some images are enlarged more than twice to --resolution {size}: lower it.")
    return {
        **drawn,
        "pixel_values": [cut_square(image, size, drawn["mirror"]) for image in images],
        "caption": "" if drawn["empty"] else caption,
        "soft_label_0": float(soft_label_0),
    }


def first_readable(pairs, most, args):
    """The first pair that can be read, of tuples of a place in words and what `prepare_pair` takes; `problems` says
    why those before it, fewer than `most`, could not."""
    problems = []
    for place, *pair in itertools.islice(pairs, min(most, MAX_BAD_IN_A_ROW)):
        try:
            return {**prepare_pair(*pair, args), "problems": problems}
        except ValueError as error:
            problems.append(f"{place}: {error}")
    raise UserError(f"None of {len(problems)} pairs in a row of {args.dataset_name} can be read, {problems[-1]}.")


def cut_square(image, resolution, mirror):
    """The middle of an RGB image, its shorter side resized to `resolution`: uint8 `[3, resolution, resolution]`."""
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BILINEAR)
    image = ImageOps.mirror(image) if mirror else image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def collate_pairs(examples):
    """B pairs as one batch: `pixel_values` uint8 `[2B, 3, H, W]`, images 0 first; B of everything else."""
    return {
        "pixel_values": torch.stack([example["pixel_values"][i] for i in (0, 1) for example in examples]),
        "captions": [example["caption"] for example in examples],
        "soft_label_0": torch.tensor([example["soft_label_0"] for example in examples]),
        "timesteps": torch.tensor([example["timestep"] for example in examples]),
        "seeds": [example["seeds"] for example in examples],
        "problems": [problem for example in examples for problem in example["problems"]],
    }


def group_for_inversion(pairs, timestep_of, args):
    """An optimiser step's pairs in groups to be inverted together: as many whole micro-batches as
    --inversion_batch_size has room for, at least one. Sorted by timestep, those of a group make about as many moves,
    so that few calls of the UNet are small."""
    size = args.train_batch_size * max(1, args.inversion_batch_size // args.train_batch_size)
    pairs = sorted(pairs, key=timestep_of)
    return [pairs[first : first + size] for first in range(0, len(pairs), size)]


def shuffled_keys(pairs, start, num_processes, process_index, args):
    """Endless groups of keys (epoch, index) of one process, optimiser step by step from step `start` on.

    Each epoch is shuffled by (seed, epoch); a remainder too small for a micro-batch of all processes waits for another
    epoch's shuffle. The pairs of a step are sorted by timestep and dealt out in turns, so that no process waits for
    one whose pairs make more moves.
    """
    pairs_per_micro_step = args.train_batch_size * num_processes
    pairs_per_step = pairs_per_micro_step * args.gradient_accumulation_steps

    def all_keys():
        for epoch in itertools.count():
            order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs))
            yield from ((epoch, int(index)) for index in order[: len(pairs) - len(pairs) % pairs_per_micro_step])

    keys = itertools.islice(all_keys(), start * pairs_per_step, None)
    while True:
        dealt = sorted(itertools.islice(keys, pairs_per_step), key=pairs.timestep)[process_index::num_processes]
        yield from group_for_inversion(dealt, pairs.timestep, args)


def streamed_pairs(pairs, state, accelerator, args):
    """Endless pairs of one process, for `first_readable`, each with the `state` to go on from after it.

    The row groups are shuffled by (seed, epoch), shared out to the processes, and `MIXED_ROW_GROUPS` of them read in
    turns. A `UserError` says which data break off."""
    name, rank, columns = args.dataset_name, accelerator.process_index, list(pairs.keys.columns)
    stream = pairs.data.shuffle(seed=args.seed, buffer_size=1, max_buffer_input_shards=MIXED_ROW_GROUPS)
    strategy = "shards" if stream.num_shards >= accelerator.num_processes else "examples"
    stream = split_dataset_by_node(stream, rank, accelerator.num_processes, strategy)
    labels = pairs.keys.astype(str).assign(label=pairs.soft_labels_0).drop_duplicates().set_index(columns)["label"]
    if not labels.index.is_unique:
        raise UserError(f"--key_columns {' '.join(columns)} do not tell pairs with unlike labels apart: name more.")
    label_of = labels.to_dict()

    epoch, drawn, position = state or (0, 0, None)
    while True:
        stream.set_epoch(epoch)
        if position is not None:
            stream.load_state_dict(position)
        before = drawn
        with explain_errors("dataset_name", name, "whole Parquet files within reach: mend that and resume"):
            for pair in stream:
                key = tuple(str(pair[column]) for column in columns)
                if key not in label_of:
                    continue
                drawn += 1
                state = epoch, drawn, stream.state_dict()
                yield key, pair, label_of[key], {**pairs.draw(epoch, rank, drawn), "state": state}
        if drawn == before and position is None:
            reason = "--key_columns fit no label, or processes outnumber row groups"
            raise UserError(f"No pair of --dataset_name {name} comes to process {rank}: {reason}.")
        epoch, position = epoch + 1, None


def streamed_batches(pairs, state, accelerator, args):
    """Endless batches of one process, with --streaming. The last of an optimiser step holds the `state` after it."""
    most = 2 * len(pairs)  # a pair may end one epoch, and all others stand before it in the next
    job = first_readable, streamed_pairs(pairs, state, accelerator, args), most, args
    reader = ThreadPoolExecutor(1)  # ahead of the step that uses it
    try:
        ahead = deque(reader.submit(*job) for _ in range(READ_AHEAD))
        while True:
            step = []
            for _ in range(args.train_batch_size * args.gradient_accumulation_steps):
                step.append(ahead.popleft().result())
                ahead.append(reader.submit(*job))
            *groups, last = group_for_inversion(step, lambda example: example["timestep"], args)
            yield from map(collate_pairs, groups)
            yield {**collate_pairs(last), "state": step[-1]["state"]}
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def ignore_stop(worker):
    """Lets a data loading process outlive the signals that its parent listens for; it ends with its parent."""
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def kill_workers():
    """Ends the data loading processes at exit: Python would wait for them, as they do not hear its SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would say that they are lost
    for worker in multiprocessing.active_children():
        worker.kill()


def make_loader(accelerator, pairs, groups, args):
    """Batches of `Pairs`, one for each group of keys, decoded by other processes where there is a GPU to be fed."""
    on_gpu, num_workers = accelerator.device.type != "cpu", args.dataloader_num_workers
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if on_gpu else 0
    pinned = accelerator.device.type == "cuda"
    options = {"num_workers": num_workers, "worker_init_fn": ignore_stop, "pin_memory": pinned}
    return torch.utils.data.DataLoader(pairs, batch_sampler=groups, collate_fn=collate_pairs, **options)


def make_batches(accelerator, pairs, progress, args):
    """Endless batches of this process, from where a run has got to."""
    rank = accelerator.process_index
    if args.streaming:
        return streamed_batches(pairs, progress.positions[rank] if progress.positions else None, accelerator, args)
    keys = shuffled_keys(pairs, progress.tried, accelerator.num_processes, rank, args)
    return iter(make_loader(accelerator, pairs, keys, args))


# ---- Checkpoints, resumption, signals -------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run is; saved in the `RECORD_FILE` of every checkpoint."""

    step: int = 0  # optimiser steps taken
    tried: int = 0  # steps attempted, those not finite included; the place in the data is counted by these
    skipped_pairs: int = 0
    positions: list = field(default_factory=list)  # with --streaming, of this process; in a file, of every one


def share_weights(folder):
    """Gives weights, which safetensors writes for their owner alone, the rights that other files have."""
    for file in Path(folder).rglob("*.safetensors"):
        with suppress(PermissionError):  # of a checkpoint that another user has written
            file.chmod(Path(folder).stat().st_mode & 0o666)


def save_lora(unet, folder):
    """Writes the LoRA of a UNet as `LORA_FILE`, which any diffusers pipeline loads, and as `KOHYA_LORA_FILE`, named as
    in kohya-ss' sd-scripts, each layer with its alpha. Equal runs write equal files."""
    layers = {f"unet.{name}": value.contiguous() for name, value in get_peft_model_state_dict(unet).items()}
    # As diffusers' `save_lora_weights`, but for the entry "format": safetensors writes several entries in any order.
    config = unet.peft_config["default"].to_dict()
    metadata = json.dumps({f"unet.{name}": value for name, value in config.items()}, default=sorted, sort_keys=True)
    of_diffusers = diffusers.utils.convert_state_dict_to_diffusers(layers)
    save_file(of_diffusers, Path(folder) / LORA_FILE, metadata={"lora_adapter_metadata": metadata})
    of_kohya = diffusers.utils.convert_state_dict_to_kohya(layers)
    alpha = torch.tensor(float(config["lora_alpha"]))  # for which the conversion takes the rank
    of_kohya.update({name: alpha.clone() for name in of_kohya if name.endswith(".alpha")})
    save_file(of_kohya, Path(folder) / KOHYA_LORA_FILE)


def load_lora(unet, folder):
    """Loads what `save_lora` wrote into the adapter that the UNet already has, or says that it does not fit."""
    layers = {name.removeprefix("unet."): value for name, value in load_file(Path(folder) / LORA_FILE).items()}
    state_dict, own = diffusers.utils.convert_unet_state_dict_to_peft(layers), get_peft_model_state_dict(unet)
    if {name: v.shape for name, v in own.items()} != {name: v.shape for name, v in state_dict.items()}:
        raise UserError(f"{folder}: its LoRA does not fit --rank and --lora_layers of this run.")
    set_peft_model_state_dict(unet, state_dict, adapter_name="default")


def plain_unet(accelerator, model):
    """The UNet inside a prepared model, its weights whole. All processes call it; under FSDP the main one gets it."""
    unet = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return unet
    state_dict = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(state_dict, assign=True)
    return plain


def register_checkpoint_hooks(accelerator, args):
    """Makes accelerate save and load the policy as a diffusers UNet or LoRA, under FSDP as shards besides."""

    def save_hook(models, weights, output_dir):
        unet = plain_unet(accelerator, models[0])
        if accelerator.is_main_process and args.rank is None:
            unet.save_pretrained(Path(output_dir) / "unet")
        elif accelerator.is_main_process:
            save_lora(unet, output_dir)
        weights.clear()

    def load_hook(models, input_dir):
        while models:
            unet = plain_unet(accelerator, models.pop())
            if args.rank is None:
                saved = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet", use_safetensors=True)
                unet.load_state_dict(saved.state_dict())
            else:
                load_lora(unet, input_dir)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def sync_to_disk(*paths):
    """Returns when files and folders are on the disk and not only in the system's memory."""
    if os.name == "nt":  # Windows does not open folders, nor sync what is open for reading
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_checkpoint(accelerator, progress, record, args):
    """Saves all that a resumed run needs as `checkpoint-STEP`, then removes the oldest checkpoints over the limit.

    All processes call it, and share the folder. What a killed run was still writing or deleting is named
    `partial-checkpoint-STEP`; whatever is named `checkpoint-STEP` is complete.
    """
    folder = Path(args.output_dir) / f"checkpoint-{progress.step}"
    partial = folder.with_name(f"partial-{folder.name}")
    if folder.exists():  # a signal after steps that were not taken
        return
    progress.positions = gather_object(progress.positions)
    try:
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / RECORD_FILE).write_text(json.dumps({**record, "progress": asdict(progress)}, indent=2))
            share_weights(partial)
            sync_to_disk(*partial.rglob("*"), partial)
            partial.rename(folder)
            sync_to_disk(folder.parent)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # of a full disk
        problem = f"--output_dir {args.output_dir}: {folder.name} cannot be written ({error})."
        raise UserError(f"{problem} {last_checkpoint(args)} Make room and resume.") from error
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        for old in find_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
            doomed = old.rename(old.with_name(f"partial-{old.name}"))  # half deleted, it has no checkpoint's name
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()


def last_checkpoint(args):
    """A sentence that names what an ended run goes on from."""
    checkpoints = find_checkpoints(args.output_dir)
    return f"The last checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."


def record_of_run(accelerator, pairs, args):
    """What a run is, for `RECORD_FILE`: its flags, its data, the machine's part in it, and versions."""
    packages = (torch, diffusers, transformers, accelerate, datasets, peft)
    data = pairs.rows.tobytes() + pairs.soft_labels_0.tobytes() + pairs.hashes.tobytes()
    return {
        "args": vars(args),
        "run": {
            "mixed_precision": accelerator.mixed_precision,
            "num_processes": accelerator.num_processes,
            "pairs": len(pairs),
            "pairs_and_labels_sha256": hashlib.sha256(data).hexdigest(),
        },
        "versions": {"python": platform.python_version(), **{p.__name__: p.__version__ for p in packages}},
        "process": f"process {os.getpid()} on {platform.node()}",
        "wandb_id": hashlib.sha256(os.urandom(16)).hexdigest()[:8],
    }


def require_same_run(record, args):
    """Takes over wandb id and progress of the run to be resumed, or says in what it differs from this one."""
    path = Path(args.resume_from_checkpoint) / RECORD_FILE
    with explain_errors("resume_from_checkpoint", path.parent, "a checkpoint-STEP folder of this script"):
        saved = json.loads(path.read_text())
    stretched = not args.lr_scheduler.startswith("constant")  # over the steps
    kept = SAME_RUN + ["max_train_steps", "num_train_epochs"] * stretched
    then, now = ({**{f"--{name}": r["args"].get(name) for name in kept}, **r["run"]} for r in (saved, record))
    changes = [f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
    if changes:
        hint = "Give what it was started with (pairs depend on --dataset_name, --key_columns, --labels_path,"
        hint += " --max_train_samples and --validation_split), or start a run in another --output_dir."
        raise UserError("\n".join([f"--resume_from_checkpoint {path.parent} is of another run:", *changes, hint]))
    record["wandb_id"], record["progress"] = saved["wandb_id"], saved["progress"]


def claim_output(record, args):
    """Makes the output folder, clears away what a killed run was still writing there, and writes the record. Returns
    the lock that keeps other runs out. A `UserError` names the run that is in it, or that it cannot be written to."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE).acquire(timeout=0)
    except Timeout as error:
        file = folder / RECORD_FILE
        holder = json.loads(file.read_text())["process"] if file.is_file() else "another run"
        raise UserError(f"--output_dir {folder} is in use by {holder}: wait for it or stop it.") from error
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to ({error}): name another.") from error
    for leftover in folder.glob("partial-checkpoint-*"):
        shutil.rmtree(leftover)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2))
    return lock


def listen_for_stop():
    """From now on `STOP_SIGNALS` (SIGUSR1 is Slurm's warning) only put their names into the list returned, for the run
    to stop after its optimiser step. A second Ctrl-C interrupts at once."""
    caught = []

    def catch(number, frame):
        caught.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), catch)
    return caught


# ---- Validation, output, model card ---------------------------------------------------------------------------------


@torch.no_grad()
def draw_validation(accelerator, unet, context):
    """Images of one UNet for the validation prompts, one prompt after the other, the same seeds every time.

    The processes share the prompts. With padding each draws as many, as under FSDP all have to call the UNet."""
    models, args, device, drawn = context.models, context.args, accelerator.device, []
    parts = {part: models[part] for part in ["vae", *TOKENIZERS, *TEXT_ENCODERS]}
    pipeline = make_pipeline(accelerator.unwrap_model(unet), args, fetched=True, **parts, **PIPELINE_OPTIONS)
    vae, seeds = models["vae"], range(args.seed, args.seed + args.num_validation_images)
    options = {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    options["num_inference_steps"] = args.validation_inference_steps
    prompts = list(enumerate(args.validation_prompts))
    with (
        accelerator.split_between_processes(prompts, apply_padding=True) as mine,
        offload_models(vae, *(models[part] for part in TEXT_ENCODERS), device=device, offload=args.offload),
    ):
        for number, prompt in mine:
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            with context.autocast():
                latents = pipeline([prompt] * len(seeds), generator=generators, **options).images
            # In the VAE's own precision: autocast would take a VAE in fp32 down with it.
            latents = (latents / vae.config.scaling_factor).to(vae.dtype)
            decoded = torch.cat([vae.decode(latent).sample for latent in latents.split(1)])
            drawn.append((number, pipeline.image_processor.postprocess(decoded)))
    free_memory()
    of_prompt = dict(gather_object(drawn))
    return [image for number, _ in prompts for image in of_prompt[number]]


def show_images(accelerator, base_images, images, step, args):
    """Saves and logs `validation/step-STEP.png`: a row a prompt, each base image left of the tuned one of its seed."""
    side_by_side = [image for both in zip(base_images, images) for image in both]
    rows, columns = len(args.validation_prompts), 2 * args.num_validation_images
    grid = diffusers.utils.make_image_grid(side_by_side, rows, columns, resize=THUMBNAIL)
    path = Path(args.output_dir) / "validation" / f"step-{step}.png"
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    accelerator.log({"validation_prompts": "; ".join(args.validation_prompts)}, step=step)
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):  # few others take images
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, **options)


@torch.no_grad()
def validate_pairs(accelerator, held_out, context):
    """Means of `metrics_of` over held-out pairs, as `validation/METRIC`: the same pairs and draws every time, and a
    multiple of what the processes take at a time, as they have to take the same number of steps."""
    args = context.args
    size, num_processes = args.train_batch_size, accelerator.num_processes
    num_batches = max(1, min(len(held_out), NUM_VALIDATION_PAIRS) // (size * num_processes))
    order = np.random.default_rng(args.seed).permutation(len(held_out))[: num_batches * size * num_processes]
    mine = order.reshape(num_batches, num_processes, size)[:, accelerator.process_index].ravel()
    groups = group_for_inversion([(0, int(index)) for index in mine], held_out.timestep, args)
    values = []
    for batch in make_loader(accelerator, held_out, groups, args):
        for micro_batch in invert_and_judge(batch, context):
            metrics = training_step(micro_batch, context)[1]
            values.append(torch.stack(list(metrics.values())))
    means = accelerator.reduce(torch.stack(values).mean(dim=0), "mean").tolist()
    kept = ("loss", "implicit_accuracy", "reward_margin", "std_tau")
    return {f"validation/{name}": mean for name, mean in zip(metrics, means) if name in kept}


def validate(accelerator, held_out, base_images, step, context):
    """Logs metrics of held-out pairs, draws prompts beside `base_images`, if any. All processes call it."""
    if held_out is not None:
        accelerator.log(validate_pairs(accelerator, held_out, context), step=step)
    if base_images:
        images = draw_validation(accelerator, context.models["unet"], context)
        if accelerator.is_main_process:
            show_images(accelerator, base_images, images, step, context.args)


def save_model_card(args, step):
    """Writes README.md of the output folder: what was trained from what, on what, how, and how to load it."""
    lora, base = args.rank is not None, published(args.pretrained_model_name_or_path)
    ours = args.hub_model_id or Path(args.output_dir).resolve().name
    load = f'pipeline = {PIPELINE.__name__}.from_pretrained("{base if lora else ours}")'
    unet = args.pretrained_unet_model_name_or_path if lora else None
    load += f"\n# It was trained on another UNet, {published(unet)}: `pipeline.unet = ...`" if unet else ""
    load += f'\npipeline.load_lora_weights("{ours}")' if lora else ""
    recipe = {name: published(getattr(args, name)) for name in SAME_RUN if getattr(args, name) is not None}
    prompts = "; ".join(html.escape(prompt) for prompt in args.validation_prompts or [])
    sections = [
        f"# SmPO-Diffusion {'LoRA' if lora else 'fine-tuning'} of {base}",
        "Trained on preference pairs with [SmPO-Diffusion](https://arxiv.org/abs/2506.02698) (Smoothed Preference"
        f" Optimization via ReNoise Inversion, ICML 2025), on `{published(args.dataset_name)}`.",
        f"```python\nfrom diffusers import {PIPELINE.__name__}\n\n{load}\n```",
        f"![base, tuned](validation/step-{step}.png)\n\nBase left of tuned, a row a prompt: {prompts}\n"
        * bool(prompts),
        "## Recipe\n",
        "| flag | value |\n|---|---|",
        *(f"| `{name}` | `{value}` |" for name, value in recipe.items()),
    ]
    data = ModelCardData(
        base_model=None if Path(args.pretrained_model_name_or_path).exists() else base,
        datasets=[args.dataset_name] if re.fullmatch(r"[\w.-]+/[\w.-]+", args.dataset_name) else None,
        library_name="diffusers",
        license=MODEL_LICENSE,
        pipeline_tag="text-to-image",
        tags=[MODEL_TAG, "text-to-image", "diffusers", "diffusers-training", "dpo", "smpo", *["lora"] * lora],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(sections)).save(Path(args.output_dir) / "README.md")


def published(value):
    """A flag's value as it may be shown to all: of a local path its last part, of a URL no user and password."""
    value = str(value)
    return Path(value).name if Path(value).exists() else re.sub("://[^/@]*@", "://", value)


def save_final(unet, step, args):
    """Writes the result to the output folder, the LoRA in two formats or a whole pipeline, and the model card; uploads
    it if asked to. A `UserError` says that the upload failed, after all is written."""
    if args.rank is not None:
        save_lora(unet, args.output_dir)
    else:
        unet.save_pretrained(Path(args.output_dir) / "unet")  # first: the rest of the pipeline may fail to load
        vae = load_network("vae", AutoencoderKL, args, torch.float32)
        pipeline = make_pipeline(unet, args, fetched=True, vae=vae)
        for part in TEXT_ENCODERS:
            getattr(pipeline, part).to(torch.float32)
        for part in (pipeline, pipeline.unet, pipeline.vae):
            part.register_to_config(_name_or_path=published(part.config["_name_or_path"]))
        pipeline.save_pretrained(args.output_dir)
    share_weights(args.output_dir)
    save_model_card(args, step)
    if args.push_to_hub:
        ours = ["checkpoint-*", "partial-checkpoint-*", "logs/*", RECORD_FILE, LOCK_FILE]
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            repo_id = create_repo(repo_id=name, exist_ok=True, private=not args.hub_public).repo_id
            upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ours)
        except Exception as error:  # over the years huggingface_hub has had the errors of two HTTP libraries
            advice = "Start the same command again with --resume_from_checkpoint latest to upload it."
            raise UserError(f"{args.output_dir} is complete, and cannot be uploaded: {error}\n{advice}") from error


# ---- The run --------------------------------------------------------------------------------------------------------


def start_accelerator(args):
    """The accelerator, and what else belongs to the process: umask, logging, seed."""
    os.umask(os.umask(0o022) | 0o002)  # nothing that is written here is for everyone to change
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / "logs")),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # for the first process to prepare a data set
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # or it holds every gradient twice
        ],
        step_scheduler_with_optimizer=False,  # it steps once an optimiser step, whatever the number of processes
    )
    if not accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_error()
        datasets.utils.logging.disable_progress_bar()
    configure_engine(accelerator, args)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.manual_seed(args.seed)  # the LoRA's first weights; all else is seeded pair by pair
    return accelerator


def configure_engine(accelerator, args):
    """Configures FSDP2, the one engine that shards; a `UserError` says what machine or engine cannot do."""
    engine, accumulation = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    given = f"--gradient_accumulation_steps {args.gradient_accumulation_steps}"
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU.")
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "mps":
        raise UserError("--mixed_precision bf16 is not supported on MPS: use fp16 or no.")
    if accumulation != args.gradient_accumulation_steps:
        raise UserError(f"{given}, but accelerate's configuration says {accumulation}: make them equal.")
    if engine == DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed is not supported: configure accelerate for FSDP, version 2, which shards as well.")
    if engine == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        # Weights gathered for an inversion stay until the backward pass: processes make unlike numbers of moves.
        plugin.reshard_after_forward = False
        # They are exchanged in fp32 and rounded where they are used, as without it.
        plugin.mixed_precision_policy = None
        # With it transformers would load the text encoders, which are not sharded, in the first process alone.
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if args.rank is not None:
            raise UserError("--rank: a LoRA is too small to be worth sharding: train it without FSDP.")
        if args.optimizer == "adafactor" or args.use_8bit_adam:
            flag = "--use_8bit_adam" if args.use_8bit_adam else "--optimizer adafactor"
            raise UserError(f"{flag} cannot work on the shards of FSDP: use --optimizer adamw alone.")
        if plugin.fsdp_version != 2 or is_accelerate_version("<", "1.13.0"):
            raise UserError("FSDP needs fsdp_version: 2 in accelerate's configuration, and accelerate 1.13 or later.")


def make_optimizer(parameters, learning_rate, args):
    """The optimiser that --optimizer and --use_8bit_adam name."""
    options = {"lr": learning_rate, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "adafactor":
        return transformers.Adafactor(parameters, **options, scale_parameter=False, relative_step=False)
    options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=True)  # one pass over the weights


def optimiser_steps(accelerator, batches, optimizer, lr_scheduler, progress, stop_signals, context):
    """Yields after each attempted optimiser step: its metrics; whether it was taken (not if loss or gradient was not
    finite, which changes nothing); whether a signal asks any of the processes to stop."""
    args, models, parameters = context.args, context.models, optimizer.param_groups[0]["params"]
    while True:
        sums, problems, num_micro_batches = 0, [], 0
        while num_micro_batches < args.gradient_accumulation_steps:
            batch = next(batches)
            problems += batch["problems"]
            for micro_batch in invert_and_judge(batch, context):
                with accelerator.accumulate(models["unet"]):
                    loss, metrics = training_step(micro_batch, context)
                    accelerator.backward(loss)
                sums = sums + torch.stack(list(metrics.values())) / args.gradient_accumulation_steps
                num_micro_batches += 1
        # Whatever the processes have to agree on, in one exchange a step.
        counts = torch.tensor([len(problems), bool(stop_signals)], device=sums.device)
        *means, num_problems, stopping = accelerator.reduce(torch.cat([sums, counts]), "mean").tolist()
        logs = {**dict(zip(metrics, means)), "lr": optimizer.param_groups[0]["lr"]}
        if not all(map(math.isfinite, means)):  # an infinite error may have a finite gradient
            parameters[0].grad.fill_(math.nan)
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        logs["grad_norm"] = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        taken = math.isfinite(logs["grad_norm"])
        if taken or accelerator.scaler is not None:  # whose step does nothing then but lower fp16's scale
            optimizer.step()
        optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)  # DDP's gradients stay where they are
        if taken:
            lr_scheduler.step()
        for problem in problems[:MIN_BAD_PAIRS]:
            logger.warning(f"A pair cannot be read, the next one takes its place: {problem}", main_process_only=False)
        progress.step += taken
        progress.tried += 1
        progress.skipped_pairs += round(num_problems * accelerator.num_processes)
        progress.positions = [batch.get("state")]
        yield logs, taken, bool(stopping)


def fit(accelerator, pairs, held_out, optimizer, lr_scheduler, progress, max_train_steps, record, context):
    """Trains up to `max_train_steps`, with logs, checkpoints and validation.

    A `UserError` names the last checkpoint if too many pairs cannot be read, or steps in a row are not finite. After a
    signal the program ends with `EXIT_STOPPED`, with a checkpoint saved."""
    args, skipped_in_a_row, validated, base_images = context.args, 0, None, []
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    tried_before, skipped_before = progress.tried, progress.skipped_pairs  # by a run whose data may have been mended
    stop_signals, batches = listen_for_stop(), make_batches(accelerator, pairs, progress, args)
    atexit.register(kill_workers)
    if args.validation_prompts:
        with reference_of(context) as reference:
            base_images = draw_validation(accelerator, reference, context)
        del reference  # of a LoRA it is the policy, which would outlive `end_run`
    hidden = not accelerator.is_local_main_process
    steps = optimiser_steps(accelerator, batches, optimizer, lr_scheduler, progress, stop_signals, context)
    with tqdm(total=max_train_steps, initial=progress.step, desc="Steps", unit="step", disable=hidden) as bar:
        while progress.step < max_train_steps:
            started = time.perf_counter()
            logs, taken, stopping = next(steps)
            logs["pairs_per_second"] = pairs_per_step / (time.perf_counter() - started)
            skipped_in_a_row = 0 if taken else skipped_in_a_row + 1
            bad_pairs = progress.skipped_pairs - skipped_before
            drawn = (progress.tried - tried_before) * pairs_per_step + bad_pairs
            logs["epoch"] = progress.tried * pairs_per_step / len(pairs)
            logs["skipped_pairs"], logs["nonfinite_steps"] = progress.skipped_pairs, progress.tried - progress.step
            if accelerator.device.type == "cuda":
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                logs["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
            bar.set_postfix({n: f"{logs[n]:.4g}" for n in ("loss", "implicit_accuracy", "lr", "pairs_per_second")})
            if taken:
                bar.update(1)
                accelerator.log(logs, step=progress.step)
            else:
                logger.warning(f"A step after step {progress.step} was not finite and changed nothing.")

            too_many_bad = bad_pairs > max(MIN_BAD_PAIRS, MAX_BAD_SHARE * drawn)
            due = taken and (progress.step % args.checkpointing_steps == 0 or progress.step == max_train_steps)
            if due or stopping or too_many_bad:
                save_checkpoint(accelerator, progress, record, args)
            if too_many_bad:
                problem = f"{bad_pairs} of {drawn} pairs cannot be read, more than {MAX_BAD_SHARE:.0%}, see above."
                raise UserError(f"{problem} {last_checkpoint(args)} Mend the images, not the rows, and resume.")
            if skipped_in_a_row == MAX_NONFINITE_STEPS:
                problem = f"Loss or gradient was not finite {skipped_in_a_row} times after step {progress.step}."
                advice = "Start a run in another --output_dir, with a lower --learning_rate or in bf16."
                raise UserError(f"{problem} {last_checkpoint(args)} {advice}")
            if stopping and progress.step < max_train_steps:
                logger.warning(f"Stopped by a signal: --resume_from_checkpoint latest goes on after {progress.step}.")
                end_run(accelerator, context.models)
                sys.exit(EXIT_STOPPED)
            if taken and progress.step % args.validation_steps == 0:
                validated = progress.step
                validate(accelerator, held_out, base_images, validated, context)
    if validated != progress.step:
        validate(accelerator, held_out, base_images, progress.step, context)


def end_run(accelerator, models):
    """Frees the policy before the process group. The other way round DDP is freed last and, with gloo, waits for a
    thread while holding Python's lock, for which that thread may be waiting."""
    models.clear()
    accelerator.free_memory()
    accelerator.end_training()


def train(accelerator, alpha_bar, prediction_type, pairs, held_out, record, args):
    """The run itself, from models to files, of what `main` has checked."""
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    models = load_models(args, accelerator.device, weight_dtype)
    set_up_unets(accelerator, models, weight_dtype, args)
    parameters = [parameter for parameter in models["unet"].parameters() if parameter.requires_grad]

    pairs_per_micro_step = args.train_batch_size * accelerator.num_processes
    steps_per_epoch = math.ceil(len(pairs) // pairs_per_micro_step / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    pairs_per_step = pairs_per_micro_step * args.gradient_accumulation_steps
    learning_rate = args.learning_rate or 1e-8 * pairs_per_step  # published: 1.024e-5 at 1,024 pairs a step
    optimizer = make_optimizer(parameters, learning_rate, args)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, max_train_steps)
    logger.info(f"Trained parameters: {sum(p.numel() for p in parameters):,}; learning rate: {learning_rate:.4g}")
    models["unet"], optimizer, lr_scheduler = accelerator.prepare(models["unet"], optimizer, lr_scheduler)
    context = Context(models, alpha_bar.to(accelerator.device), prediction_type, accelerator.autocast, args)

    progress = Progress(**record.get("progress", {}))
    register_checkpoint_hooks(accelerator, args)
    if args.resume_from_checkpoint is not None:
        advice = "a whole checkpoint of this run: remove it if it is damaged, and go on from the one before"
        with explain_errors("resume_from_checkpoint", args.resume_from_checkpoint, advice):
            accelerator.load_state(args.resume_from_checkpoint)
    logger.info(f"{len(pairs)} pairs; {max_train_steps} steps, from {progress.step} on")
    if accelerator.is_main_process:
        flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
        run = record["wandb_id"]
        going_on = {"wandb": {"id": run, "resume": "allow"}, "trackio": {"name": run, "resume": "allow"}}
        with explain_errors("report_to", args.report_to, "a tracker that is logged in to, or none"):
            accelerator.init_trackers("smpo-diffusion", config=flat, init_kwargs=going_on)

    fit(accelerator, pairs, held_out, optimizer, lr_scheduler, progress, max_train_steps, record, context)
    policy = plain_unet(accelerator, models["unet"])
    if accelerator.is_main_process:
        save_final(policy, progress.step, args)
    end_run(accelerator, models)


def main(args):
    accelerator = start_accelerator(args)

    # Configurations and data before weights: a wrong model or column is found in seconds.
    check_models(args)
    alpha_bar, prediction_type = load_noise_schedule(args)
    pairs, held_out = load_pairs(accelerator, len(alpha_bar), args)
    record = record_of_run(accelerator, pairs, args)
    if args.resume_from_checkpoint is not None:
        require_same_run(record, args)
    with claim_output(record, args) if accelerator.is_main_process else nullcontext():
        try:
            train(accelerator, alpha_bar, prediction_type, pairs, held_out, record, args)
        except torch.OutOfMemoryError as error:
            advice = "resume with --gradient_checkpointing or --offload, or start with a smaller --train_batch_size or"
            problem = f"{error}\nThe device has too little memory: {advice} --inversion_batch_size."
            raise UserError(f"{problem} {last_checkpoint(args)}") from error


if __name__ == "__main__":
    with short_errors():
        main(ARGS)
