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
#     "accelerate>=1.7.0",
#     "datasets>=3.6.0",
#     "peft>=0.17.0",
#     "pyarrow>=17.0",
#     "pillow>=10.1",
#     "tensorboard",
# ]
# ///
"""Fine-tunes Stable Diffusion 1.5 on preference pairs with SmPO-Diffusion (https://arxiv.org/abs/2506.02698, ICML 2025).

    accelerate launch train_smpo_sd15.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name PICKAPIC_V2 --labels_path labels.parquet --output_dir smpo-sd15 \
        --mixed_precision fp16 --train_batch_size 1 --gradient_accumulation_steps 128 \
        --learning_rate 1e-8 --scale_lr --lr_warmup_steps 100 --max_train_steps 200

on 8 GPUs has the published hyper-parameters: 1024 pairs a step, 200 steps. `labels.parquet` comes from relabel_pickapic.py.

Diffusion-DPO noises the two images of a pair with random noise and asks which one the policy denoises better than the
reference, taking a hard winner for granted. SmPO changes both ends: the noise is found by inverting the image with the
policy itself (DDIM inversion and a ReNoise correction), and the pair weighs as much as a reward model is sure of it.

    here           in the paper, or by formula
    x_0            clean latents, scaled                                        [N, 4, h, w]
    t, x_t         timestep in 0..T-1 and latents there
    alpha_bar      cumulative product of 1 - beta, one entry a timestep         [T]
    eps            noise predicted by a UNet
    tau            noise implied by a pair: (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)
    p_0            alpha / gamma seen from image 0: P(image 0 is preferred), column `soft_label_0`
    beta, gamma    strength of the pull to the reference; sensitivity to the label

A batch of B pairs is 2B images: image 0 of every pair, then image 1 of every pair.

Where this parts from the authors' released code, on purpose:

 1. The inversion grid of each sample ends exactly at its t, and starts from alpha_bar = 1. Theirs has fixed levels, stops
    at the level next to t (up to T / levels away) and scores the result as if it were t.
 2. Every pair of a micro-batch has its own t and its own label; theirs uses the first pair's for all.
 3. A move is corrected with the prediction at its destination, after the last move by default (`--renoise_at`); theirs
    averages two predictions at every level.
 4. alpha_bar is never held in half precision (there sqrt(1 - alpha_bar) is off by 7 % at t = 0 and 1).
 5. The two images of a pair share one flip and one crop.
 6. A pair that cannot be read is replaced by the next one and counted; the others stay in step.
 7. Every random draw belongs to (seed, epoch, pair): a resumed run sees the data that it would have seen, and an epoch
    is the same however it is split into micro-batches and processes (but with --streaming).
 8. Resuming is asked for, never silent, and goes on with the same run or not at all; a checkpoint is there whole or not.
"""

import argparse
import atexit
import copy
import hashlib
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
import textwrap
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import accelerate
import datasets
import fsspec
import numpy as np
import peft
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
)
from datasets import load_dataset, load_dataset_builder, load_from_disk
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, CLIPTextModel, CLIPTokenizer

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params, free_memory, offload_models
from diffusers.utils import (
    check_min_version,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
    is_accelerate_version,
    is_wandb_available,
)
from diffusers.utils.torch_utils import is_compiled_module


if is_wandb_available():
    import wandb

check_min_version("0.35.0")

logger = get_logger(__name__)

# What tells this script from its sibling for the other model, besides some functions and defaults.
PIPELINE = StableDiffusionPipeline
PIPELINE_OPTIONS = {"safety_checker": None}  # of validation
TOKENIZERS = ["tokenizer"]
TEXT_ENCODERS = ["text_encoder"]
ADDITION_EMBED_TYPE = None
ACCEPTED_MODELS = "Stable Diffusion 1.x and 2.x text-to-image models; for SDXL there is train_smpo_sdxl.py"
MODEL_LICENSE = "creativeml-openrail-m"
MODEL_TAG = "stable-diffusion"

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore was tuned from this CLIP
NUM_INVERSION_STEPS = 9  # the paper's choice; 19 was a little better there at twice the cost
RENOISE_AT = "last_move"  # "few-step DDIM inversion, then one correction at x_t"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
KOHYA_LORA_FILE = "pytorch_lora_weights_kohya.safetensors"
LORA_LAYERS = "to_k,to_q,to_v,to_out.0"
INTERPOLATION_MODES = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
LABEL_KEYS = ["image_0_uid", "image_1_uid", "ranking_id"]  # the columns of a labels file that name a pair
READ_ROWS = 16  # rows read from a file at a time
READ_BUFFER = 8 * 2**20  # bytes fetched of one column at a time
NUM_READERS = 16  # threads that read what is small of many files
SHUFFLE_BUFFER_SIZE = 1000  # pairs, some 350 MB in Pick-a-Pic, of which two buffers are held
MAX_WORKERS = 8
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
PROCESS_TIMEOUT = timedelta(hours=6)  # how long processes wait for the first one to prepare a data set
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal with a checkpoint saved, to be started again
RECORD_FILE = "training_args.json"
BEST_FILE = "best.json"
NUM_PICTURED_PROMPTS = 8  # of the validation prompts
# A run that is resumed may change these and is still the same run; what the data hold is compared by itself.
FREE_FLAGS = [
    "dataset_name", "dataset_config_name", "labels_path", "cache_dir", "dataloader_num_workers", "vae_encode_batch_size",
    "inversion_batch_size", "offload", "compile", "gradient_checkpointing", "logging_dir", "report_to",
    "tracker_project_name", "validation_prompts", "num_validation_images", "validation_steps",
    "validation_guidance_scale", "validation_inference_steps", "validation_labels_path", "max_validation_samples",
    "validation_reward_model", "save_precision", "output_dir", "overwrite_output_dir", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "resume_despite_changes", "max_nonfinite_steps",
    "max_bad_fraction", "output_kohya_format", "push_to_hub", "hub_token", "hub_model_id",
]  # fmt: skip
MIN_BAD_PAIRS = 10  # fewer say nothing about the share of unreadable pairs
# A Diffusion-DPO pair weighs 1, an SmPO pair gamma |2 p_0 - 1|. The logged shares of the weight are split at these.
WEIGHT_BINS = {"weak": (0.0, 0.3), "medium": (0.3, 1.0), "strong": (1.0, math.inf)}


# ---------------------------------------------------------------------------------------------------------------------
# The maths: pure functions of tensors
# ---------------------------------------------------------------------------------------------------------------------


def per_sample(values, x):
    """`values`, one number for all or `[N]`, in a shape and precision to multiply `x` `[N, ...]` with.

    Never less than float32, whatever `x` is.

    >>> per_sample(torch.tensor([0.5, 0.25]), torch.zeros(2, 4, 8, 8, dtype=torch.float16)).shape
    torch.Size([2, 1, 1, 1])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = torch.as_tensor(values, dtype=dtype, device=x.device)
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim == 1 else values


def add_noise(x_0, noise, alpha_bar_t):
    """Forward process of DDPM: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise`.

    `x_0`, `noise` and the result are `[N, ...]`, `alpha_bar_t` is `[N]` or a number. This is how Diffusion-DPO
    (https://arxiv.org/abs/2311.12908) reaches x_t, with the same noise for both images of a pair.

    >>> add_noise(torch.tensor([5.0]), torch.tensor([10.0]), 0.64)  # 0.8 * 5 + 0.6 * 10
    tensor([10.])
    """
    alpha_bar_t = per_sample(alpha_bar_t, x_0)
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


def ddim_move(x_s, eps, alpha_bar_s, alpha_bar_d):
    """Deterministic DDIM move from the noise level s to the level d, up or down (https://arxiv.org/abs/2010.02502, Eq. 12).

    `x_d = sqrt(alpha_bar_d) (x_s - sqrt(1 - alpha_bar_s) eps) / sqrt(alpha_bar_s) + sqrt(1 - alpha_bar_d) eps`

    Args:
        x_s: latents at the source level, `[N, ...]`.
        eps: noise prediction for the move, like `x_s`.
        alpha_bar_s, alpha_bar_d: levels of source and destination, `[N]` or a number in (0, 1]; 1 is clean.

    Returns:
        Latents at the destination, like `x_s`.

    >>> x_t = ddim_move(torch.tensor([5.0]), torch.tensor([10.0]), 1.0, 0.64)  # up from clean latents
    >>> x_t, ddim_move(x_t, torch.tensor([10.0]), 0.64, 1.0)  # and back down
    (tensor([10.]), tensor([5.]))
    """
    alpha_bar_s, alpha_bar_d = per_sample(alpha_bar_s, x_s), per_sample(alpha_bar_d, x_s)
    x_0 = (x_s - (1 - alpha_bar_s).sqrt() * eps) / alpha_bar_s.sqrt()
    return alpha_bar_d.sqrt() * x_0 + (1 - alpha_bar_d).sqrt() * eps


def inversion_timesteps(t, num_inversion_steps, num_train_timesteps):
    """Timesteps at which each sample stands before its first inversion move and after every move.

    A sample at t takes `k = ceil(n (t + 1) / T)` moves of equal length in timesteps, the last of which lands on t
    itself: small t costs few moves, `(n + 1) / 2` on average.

    Args:
        t: timestep of each sample in 0..T-1, int64 `[N]`.
        num_inversion_steps: n, the moves that a sample at t = T - 1 takes.
        num_train_timesteps: T.

    Returns:
        int64 `[N, n + 1]`; column j is `(t + 1) j // k - 1`, so column 0 is -1, which stands for clean latents. A
        sample that has arrived stays at t in the columns that are left.

    Raises:
        ValueError: n is not in 1..T, or a t is not in 0..T-1.

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


@torch.no_grad()
def invert(predict_noise, x_0, t, alpha_bar, num_inversion_steps, noising, renoise_at):
    """Latents `x_t` from which DDIM sampling with this model would come back to `x_0`.

    "ddim" moves from clean latents up to t along `inversion_timesteps`, each move with the prediction at its source.
    "renoise" redoes a move from the same source with the prediction at its destination: one fixed-point iteration on
    the implicit step that sampling takes (ReNoise, https://arxiv.org/abs/2403.14602).

    Args:
        predict_noise: `predict_noise(x, t, rows)`, the noise `[R, ...]` in latents `x` `[R, ...]` at timesteps `t` `[R]`,
            for the batch rows `rows` `[R]` that are still moving, in any order. Clean latents are passed with timestep 0.
        x_0: clean latents, `[N, ...]`, float32 or float64.
        t: timestep of each sample, int64 `[N]`; on the CPU it costs no synchronisation.
        alpha_bar: cumulative alphas, `[T]`.
        num_inversion_steps: moves of a sample at the last timestep, see `inversion_timesteps`.
        noising: "ddim" or "renoise".
        renoise_at: "last_move" or "every_move", the moves that "renoise" corrects.

    Returns:
        Latents at t, like `x_0`, without gradient.

    Raises:
        ValueError: `noising` or `renoise_at` is none of the above, or see `inversion_timesteps`.

    >>> x_0, alpha_bar = torch.tensor([[5.0]]), torch.tensor([0.9, 0.64, 0.36])
    >>> def always_ten(x, t, rows):
    ...     return torch.full_like(x, 10.0)
    >>> invert(always_ten, x_0, torch.tensor([1]), alpha_bar, 3, "renoise", "last_move")  # 0.8 * 5 + 0.6 * 10
    tensor([[10.]])
    """
    if noising not in ("ddim", "renoise"):
        raise ValueError(f'noising must be "ddim" or "renoise" to invert, got {noising!r}.')
    if renoise_at not in ("last_move", "every_move"):
        raise ValueError(f'renoise_at must be "last_move" or "every_move", got {renoise_at!r}.')
    levels = inversion_timesteps(t.cpu(), num_inversion_steps, len(alpha_bar))
    num_moves = (levels[:, 1:] > levels[:, :-1]).sum(dim=1)
    # Those that make the most moves come first: who still moves is a slice, and nothing waits for the GPU between moves.
    order = num_moves.argsort(descending=True, stable=True)
    moving = [int((num_moves > move).sum()) for move in range(int(num_moves.max()))]
    levels, rows = levels[order].T.to(x_0.device), order.to(x_0.device)
    alpha_bar = torch.cat([alpha_bar.new_ones(1), alpha_bar]).to(x_0.device)  # entry l + 1 belongs to timestep l
    x = x_0[rows]
    x_last, last = x.clone(), levels[0].clone()  # where the last move of each starts

    for count, source, destination in zip(moving, levels[:-1], levels[1:]):
        s, d, x_s = source[:count], destination[:count], x[:count].clone()
        alpha_bar_s, alpha_bar_d = alpha_bar[s + 1], alpha_bar[d + 1]
        x_d = ddim_move(x_s, predict_noise(x_s, s.clamp(min=0), rows[:count]), alpha_bar_s, alpha_bar_d)
        if noising == "renoise" and renoise_at == "every_move":
            x_d = ddim_move(x_s, predict_noise(x_d, d, rows[:count]), alpha_bar_s, alpha_bar_d)
        x[:count], x_last[:count], last[:count] = x_d, x_s, s
    if noising == "renoise" and renoise_at == "last_move":  # of all samples in one call, however many moves each made
        d = levels[-1]
        x = ddim_move(x_last, predict_noise(x, d, rows), alpha_bar[last + 1], alpha_bar[d + 1])
    return torch.empty_like(x).index_copy_(0, rows, x)


def num_inversion_calls(t, alpha_bar, num_inversion_steps, noising, renoise_at):
    """How often `invert` calls `predict_noise` for samples at `t` `[N]`; arguments and errors are those of `invert`.

    >>> alpha_bar = torch.linspace(0.999, 0.005, 1000)
    >>> num_inversion_calls(torch.tensor([999]), alpha_bar, 9, "renoise", "last_move")  # 9 moves, the last one twice
    10
    """
    levels = inversion_timesteps(t, num_inversion_steps, len(alpha_bar))
    num_moves = int((levels[:, 1:] > levels[:, :-1]).sum(dim=1).max())
    if noising == "ddim":
        return num_moves
    return 2 * num_moves if renoise_at == "every_move" else num_moves + 1


def implied_noise(x_0, x_t, alpha_bar_t):
    """tau, the noise that leads from `x_0` to `x_t`: `(x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)`.

    `x_0`, `x_t` and the result are `[N, ...]`, `alpha_bar_t` is `[N]` or a number below 1. It undoes `add_noise`, and is
    the target of both UNets in the loss (tau_t in the SmPO paper).

    >>> implied_noise(torch.tensor([5.0]), torch.tensor([10.0]), 0.64)  # (10 - 0.8 * 5) / 0.6
    tensor([10.])
    """
    alpha_bar_t = per_sample(alpha_bar_t, x_0)
    return (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()


def noise_from_prediction(model_pred, x_t, alpha_bar_t, prediction_type):
    """Noise that a UNet's output stands for; all are `[N, ...]`, `alpha_bar_t` is `[N]` or a number.

    A v-prediction (https://arxiv.org/abs/2202.00512) is `v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0`, so
    `eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t`.

    >>> x_0, eps = torch.tensor([5.0]), torch.tensor([10.0])
    >>> x_t, v = 0.8 * x_0 + 0.6 * eps, 0.8 * eps - 0.6 * x_0
    >>> noise_from_prediction(v, x_t, 0.64, "v_prediction")
    tensor([10.])
    """
    if prediction_type == "epsilon":
        return model_pred
    alpha_bar_t = per_sample(alpha_bar_t, x_t)
    return alpha_bar_t.sqrt() * model_pred + (1 - alpha_bar_t).sqrt() * x_t


def smpo_loss(model_errors, ref_errors, soft_label_0, beta, gamma):
    """Loss of SmPO-Diffusion over B pairs.

    `loss = -log sigmoid(-0.5 beta gamma (2 p_0 - 1) D)`, averaged over the pairs, where D is how much more the policy errs
    than the reference on image 0, less the same on image 1. The factor 2 alpha - gamma of the paper is
    `gamma (2 p - 1)`. With p_0 in {0, 1} and gamma = 1 this is Diffusion-DPO's loss, whose code has the same 0.5 and takes
    errors as means over pixels; beta 2000 and 5000 are stated in that convention.

    Args:
        model_errors: mean squared error of the policy's noise prediction for each image, `[2B]`, images 0 first.
        ref_errors: the same of the reference.
        soft_label_0: p_0, the probability that image 0 is preferred, `[B]`, in [0, 1].
        beta: strength of the pull to the reference.
        gamma: sensitivity to the label.

    Returns:
        The loss, a scalar, and the argument of log sigmoid, `[B]`.

    Where the policy errs less on the preferred image than the reference does, the loss is below log 2 = 0.693:

    >>> model_errors, ref_errors = torch.tensor([0.090, 0.110]), torch.tensor([0.100, 0.110])  # image 0, image 1
    >>> smpo_loss(model_errors, ref_errors, torch.tensor([0.55]), beta=200, gamma=10)
    (tensor(0.3133), tensor([1.]))
    """
    error_gap_0, error_gap_1 = (model_errors - ref_errors).chunk(2)
    logits = -0.5 * beta * gamma * (2 * soft_label_0 - 1) * (error_gap_0 - error_gap_1)
    return -torch.nn.functional.logsigmoid(logits).mean(), logits


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Fine-tunes Stable Diffusion 1.5 with SmPO-Diffusion.")

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Base model: a Hub name or a folder.")
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help='Variant of the base model\'s weight files, for example "fp16".')
    group.add_argument(
        "--pretrained_unet_model_name_or_path",
        help="UNet that policy and reference start from instead of the base model's, for example after supervised"
        " fine-tuning: a UNet folder, or a pipeline. The authors' SD1.5 script starts from one.",
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="VAE instead of the base model's: a VAE folder or repository, or a pipeline. For SDXL in half precision"
        " madebyollin/sdxl-vae-fp16-fix; SDXL's own overflows there and runs in fp32.",
    )
    group.add_argument(
        "--rank", type=int, help="Train a LoRA of this rank. Without it all weights of the UNet are trained."
    )
    group.add_argument("--lora_alpha", type=int, help="LoRA scale numerator. Default: the rank.")
    group.add_argument("--lora_layers", help=f"Comma-separated modules that get a LoRA. Default: {LORA_LAYERS}.")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        required=True,
        help="Data set: a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", "--split", default="train", help="Split of the data set.")
    group.add_argument(
        "--streaming",
        action="store_true",
        help="Read Parquet files where they lie, on a disk or on the Hub, without a copy. Pairs are then shuffled within a"
        " buffer, and row groups as a whole.",
    )
    group.add_argument(
        "--shuffle_buffer_size", type=int, help=f"Pairs that are shuffled together. Default: {SHUFFLE_BUFFER_SIZE}."
    )
    group.add_argument(
        "--labels_path",
        help="Parquet file of soft labels from relabel_pickapic.py, joined to the pairs on their uids. Without it the"
        " label column is one of the data set's own.",
    )
    group.add_argument(
        "--label_column",
        default="soft_label_0",
        help="P(image 0 is preferred), in [0, 1]. soft_label_0 is SmPO's; label_0, the human label, is Diffusion-DPO's.",
    )
    group.add_argument("--image_0_column", default="jpg_0", help="Encoded bytes, or a `datasets.Image`.")
    group.add_argument("--image_1_column", default="jpg_1", help="Encoded bytes, or a `datasets.Image`.")
    group.add_argument("--caption_column", default="caption", help="Prompt of the images.")
    group.add_argument("--image_0_uid_column", default="image_0_uid", help="Identifier of image 0.")
    group.add_argument("--image_1_uid_column", default="image_1_uid", help="Identifier of image 1.")
    group.add_argument(
        "--ranking_id_column", default="ranking_id", help="Identifier of the comparison; may be missing."
    )
    group.add_argument(
        "--human_label_column",
        default="label_0",
        help="Human label in {0, 0.5, 1}, where 0.5 is a tie; ties are not trained on, as in the paper. If there is no such"
        ' column, or with the value "none", human labels play no part.',
    )
    group.add_argument("--max_train_samples", type=int, help="Train on this many pairs, drawn with --seed.")
    group.add_argument("--cache_dir", help="Where downloaded models and data are kept.")
    group.add_argument("--resolution", type=int, default=512, help="Side of the square images, in pixels.")
    group.add_argument("--random_crop", action="store_true", help="Crop at random, not at the centre.")
    group.add_argument("--no_hflip", action="store_true", help="Never mirror. Otherwise half of the pairs are.")
    group.add_argument("--image_interpolation_mode", default="bilinear", choices=INTERPOLATION_MODES, help="Resizing.")
    group.add_argument(
        "--proportion_empty_prompts", type=float, default=0.2, help="Share of the prompts that are emptied."
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        help=f"Processes that decode images. Default: with a GPU as many as there are cores, {MAX_WORKERS} at most, or else 0.",
    )
    group.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.1,
        help=f"Stop if more of the drawn pairs than this share cannot be read, and more than {MIN_BAD_PAIRS}. Until then the"
        " next pair takes the place of each.",
    )

    group = parser.add_argument_group("method")
    group.add_argument(
        "--noising",
        default="renoise",
        choices=["renoise", "ddim", "forward"],
        help="How x_t is reached: DDIM inversion with ReNoise correction (SmPO), DDIM inversion alone, or the forward"
        " process with random noise (Diffusion-DPO).",
    )
    group.add_argument(
        "--num_inversion_steps",
        type=int,
        help=f"n, inversion moves of a pair at the last timestep. Default: {NUM_INVERSION_STEPS}, in both published recipes.",
    )
    group.add_argument(
        "--renoise_at",
        choices=["last_move", "every_move"],
        help=f"Which inversion moves are corrected. Default: {RENOISE_AT}. 5 moves corrected at every move cost what 9"
        " corrected at the last do.",
    )
    group.add_argument(
        "--inversion_guidance_scale",
        type=float,
        help="Classifier-free guidance in the inversion. Default: 1, none, as published; anything else doubles its cost.",
    )
    group.add_argument(
        "--beta_dpo",
        type=float,
        default=2000,
        help="beta, strength of the pull to the reference. Published: 2000 for SD1.5, 5000 for SDXL.",
    )
    group.add_argument(
        "--gamma",
        type=float,
        default=10,
        help="gamma, sensitivity to the label. Published: 10. With hard labels use 1, which is Diffusion-DPO.",
    )
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        help="What the UNet predicts. Default: what the base model's scheduler says.",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--seed", type=int, default=0, help="Seed of data order, crops, timesteps and noise.")
    group.add_argument("--train_batch_size", type=int, default=4, help="Pairs per process and micro-batch.")
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="Micro-batches per optimiser step. Published: 128 on 8 GPUs with one pair each, 1024 pairs a step.",
    )
    group.add_argument("--num_train_epochs", type=int, default=1, help="Ignored if --max_train_steps is given.")
    group.add_argument("--max_train_steps", type=int, help="Optimiser steps. Published: 200.")
    group.add_argument(
        "--learning_rate", type=float, default=1e-8, help="Published: 1e-8 with --scale_lr, 1.024e-5 in effect."
    )
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by processes, micro-batch size and accumulation steps.",
    )
    group.add_argument(
        "--lr_scheduler",
        default="constant_with_warmup",
        choices=[scheduler.value for scheduler in SchedulerType],
        help="Learning-rate schedule over optimiser steps.",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="Warm-up, in optimiser steps. Published: 100.")
    group.add_argument("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    group.add_argument("--lr_power", type=float, default=1.0, help="Power of the polynomial schedule.")
    group.add_argument(
        "--lr_step_rules",
        help='Rules of piecewise_constant: "1:10,0.1:20,0.01" multiplies by 1 to step 10, by 0.1 to step 20, then 0.01.',
    )
    group.add_argument(
        "--optimizer",
        default="adamw",
        choices=["adamw", "adafactor"],
        help="Published: AdamW for SD1.5, Adafactor (no relative step, no parameter scaling) for SDXL.",
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW only.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW only.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Weight decay of either optimiser.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW only.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    group.add_argument(
        "--max_nonfinite_steps",
        type=int,
        default=20,
        help="Stop after so many steps in a row whose loss or gradient is not finite. Each is skipped and counted.",
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Default: what accelerate is configured to. Trained weights stay in fp32.",
    )
    group.add_argument(
        "--inversion_batch_size",
        type=int,
        default=16,
        help="Pairs that are encoded, inverted and judged by the reference at a time, which takes no gradient and therefore"
        " little memory: micro-batches of one optimiser step together. The result is the same; larger is faster.",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory for a third more compute.")
    group.add_argument("--vae_encode_batch_size", type=int, default=8, help="Images that the VAE encodes at a time.")
    group.add_argument(
        "--offload",
        action="store_true",
        help="Keep VAE, text encoders and the reference on the CPU while they are not in use: less memory, slower.",
    )
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs.")
    group.add_argument(
        "--compile",
        action="store_true",
        help="Compile the UNets' transformer blocks: faster steps after some minutes, for runs of many steps.",
    )

    group = parser.add_argument_group("logging and validation")
    group.add_argument("--logging_dir", default="logs", help="Folder of the logs inside --output_dir.")
    group.add_argument("--report_to", default="tensorboard", help='"tensorboard", "wandb", "all" or "none".')
    group.add_argument("--tracker_project_name", default="smpo-diffusion", help="Project name for the trackers.")
    group.add_argument(
        "--validation_split",
        help="Pairs on which loss, accuracy and margin are measured, at fixed timesteps and noise: the name of a split, or a"
        " share such as 0.02 of the training pairs, all those of some prompts, which are not trained on then. With --streaming"
        " a split, which is downloaded.",
    )
    group.add_argument(
        "--validation_labels_path", help="Labels of a --validation_split with a name. Default: --labels_path."
    )
    group.add_argument(
        "--max_validation_samples", type=int, default=256, help="Measure on at most so many of these pairs."
    )
    group.add_argument(
        "--validation_prompts",
        nargs="*",
        help="Prompts to draw, base and policy side by side; or a .txt file with a prompt a line.",
    )
    group.add_argument("--num_validation_images", type=int, default=2, help="Images per validation prompt.")
    group.add_argument(
        "--validation_reward_model",
        help="CLIP-style model that scores the images of the validation prompts, for a median and a win rate over the base;"
        f" the best checkpoint by that is kept and named in {BEST_FILE}.",
    )
    group.add_argument("--validation_steps", type=int, default=50, help="Validate every so many optimiser steps.")
    group.add_argument(
        "--validation_guidance_scale", type=float, default=7.5, help="Classifier-free guidance of validation images."
    )
    group.add_argument(
        "--validation_inference_steps", type=int, default=50, help="Denoising steps of validation images."
    )

    group = parser.add_argument_group("checkpoints and output")
    group.add_argument("--output_dir", required=True, help="Where checkpoints, logs and the final model go.")
    group.add_argument("--checkpointing_steps", type=int, default=50, help="Save every so many optimiser steps.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest so many checkpoints.")
    group.add_argument(
        "--resume_from_checkpoint",
        help='Checkpoint folder to go on from, or "latest" for the newest in --output_dir, or the start if there is none.',
    )
    group.add_argument(
        "--resume_despite_changes",
        action="store_true",
        help="Resume although data, model, batch or method are not those of the checkpoint.",
    )
    group.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Start over in a folder that is not empty: checkpoints, logs, pictures and model of the run in it are deleted.",
    )
    group.add_argument(
        "--output_kohya_format",
        action="store_true",
        help=f"Write the LoRA also as {KOHYA_LORA_FILE}, which ComfyUI and A1111 read.",
    )

    group.add_argument(
        "--save_precision",
        default="fp32",
        choices=["fp32", "fp16"],
        help="Precision in which a full model is written.",
    )

    group = parser.add_argument_group("hub")
    group.add_argument("--push_to_hub", action="store_true", help="Upload the final model to the Hub.")
    group.add_argument("--hub_token", help="Token for the Hub; better kept in `hf auth login`.")
    group.add_argument("--hub_model_id", help="Repository to upload to. Default: the name of --output_dir.")

    args = parser.parse_args(input_args)
    validate_args(args)
    return args


def share_of(split):
    """A --validation_split as a number, None if it is a name or not given."""
    try:
        return None if split is None else float(split)
    except ValueError:
        return None


def validate_args(args):
    """Fills in the defaults that depend on other flags.

    Raises:
        ValueError: with every problem that the flags alone show, one a line, before anything is loaded.
    """
    problems = []

    def positive(*names):
        for name in names:
            value = getattr(args, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"--{name} must be positive and finite, got {value}.")

    positive("rank", "lora_alpha", "max_train_samples", "resolution", "num_inversion_steps", "beta_dpo", "gamma")
    positive("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "learning_rate")
    positive(
        "lr_num_cycles", "lr_power", "adam_epsilon", "max_grad_norm", "vae_encode_batch_size", "inversion_batch_size"
    )
    positive("num_validation_images", "validation_steps", "validation_inference_steps", "shuffle_buffer_size")
    positive("max_validation_samples", "checkpointing_steps", "checkpoints_total_limit", "max_nonfinite_steps")
    if args.resolution % 8:
        problems.append(f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}.")
    if not 0 <= args.proportion_empty_prompts <= 1:
        problems.append(f"--proportion_empty_prompts must be in [0, 1], got {args.proportion_empty_prompts}.")
    if not 0 <= args.max_bad_fraction <= 1:
        problems.append(f"--max_bad_fraction must be in [0, 1], got {args.max_bad_fraction}.")
    for name in ("lr_warmup_steps", "dataloader_num_workers", "seed", "adam_weight_decay"):
        if (getattr(args, name) or 0) < 0:
            problems.append(f"--{name} must not be negative, got {getattr(args, name)}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            problems.append(f"--{name} must be in [0, 1), got {getattr(args, name)}.")
    for name in ("inversion_guidance_scale", "validation_guidance_scale"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            problems.append(f"--{name} must be finite, got {getattr(args, name)}.")
    for name in ("lora_alpha", "lora_layers"):
        if args.rank is None and getattr(args, name) is not None:
            problems.append(f"--{name} belongs to LoRA training: give --rank as well, or leave it out.")
    if args.save_precision != "fp32" and args.rank is not None:
        problems.append(
            "--save_precision is that of a full model, a LoRA is small: leave it out, or leave out --rank."
        )
    for name, needed in (
        ("validation_labels_path", "validation_split"),
        ("validation_reward_model", "validation_prompts"),
    ):
        if getattr(args, name) is not None and not getattr(args, needed):
            problems.append(f"--{name} does nothing without --{needed}: give both, or leave it out.")
    if share_of(args.validation_split) is not None:
        if not 0 < share_of(args.validation_split) < 1:
            problems.append(f"--validation_split must be a split or a share in (0, 1), got {args.validation_split}.")
        if args.streaming:
            problems.append(
                "--validation_split with a share needs pairs from everywhere: give a split, or no --streaming."
            )
        if args.validation_labels_path is not None:
            problems.append("--validation_labels_path is for a split with a name, not for a share: leave it out.")
    if args.validation_labels_path is not None and not Path(args.validation_labels_path).is_file():
        problems.append(f"--validation_labels_path {args.validation_labels_path} is not a file.")
    if args.validation_reward_model is not None and args.validation_steps % args.checkpointing_steps:
        problems.append(
            f"--validation_steps {args.validation_steps} must be a multiple of --checkpointing_steps"
            f" {args.checkpointing_steps}, so that the best model is there as a checkpoint."
        )
    prompts = args.validation_prompts or []
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        if not Path(prompts[0]).is_file():
            problems.append(f"--validation_prompts {prompts[0]} is not a file.")
        else:
            lines = Path(prompts[0]).read_text(encoding="utf-8").splitlines()
            args.validation_prompts = [line.strip() for line in lines if line.strip()]
            if not args.validation_prompts:
                problems.append(f"--validation_prompts {prompts[0]} has no prompts.")
    if args.shuffle_buffer_size is not None and not args.streaming:
        problems.append(
            "--shuffle_buffer_size belongs to --streaming; otherwise all pairs are shuffled: leave it out."
        )
    if args.output_kohya_format and args.rank is None:
        problems.append("--output_kohya_format belongs to LoRA training: give --rank as well, or leave it out.")
    if args.noising != "renoise" and args.renoise_at is not None:
        problems.append(f"--renoise_at belongs to --noising renoise, not to --noising {args.noising}: leave it out.")
    for name in ("num_inversion_steps", "inversion_guidance_scale"):
        if args.noising == "forward" and getattr(args, name) is not None:
            problems.append(f"--{name} has no meaning with --noising forward, which inverts nothing: leave it out.")
    if args.use_8bit_adam and args.optimizer != "adamw":
        problems.append(f"--use_8bit_adam is an AdamW: give --optimizer adamw, not {args.optimizer}.")
    if (args.lr_scheduler == "piecewise_constant") != (args.lr_step_rules is not None):
        problems.append("--lr_step_rules and --lr_scheduler piecewise_constant need each other: give both or neither.")
    if args.lr_warmup_steps and args.lr_scheduler in ("constant", "piecewise_constant"):
        problems.append(
            f"--lr_scheduler {args.lr_scheduler} has no warm-up: drop --lr_warmup_steps or use constant_with_warmup."
        )
    if args.report_to not in ("tensorboard", "wandb", "all", "none"):
        problems.append(f'--report_to must be "tensorboard", "wandb", "all" or "none", got {args.report_to!r}.')
    if args.report_to == "wandb" and not is_wandb_available():
        problems.append("--report_to wandb needs wandb: pip install wandb.")
    if args.report_to == "tensorboard" and not is_tensorboard_available():
        problems.append("--report_to tensorboard needs tensorboard: pip install tensorboard, or --report_to none.")
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        problems.append("--hub_token would be logged by wandb: leave it out and run `hf auth login` instead.")
    if (args.hub_token or args.hub_model_id) and not args.push_to_hub:
        problems.append("--hub_token and --hub_model_id do nothing without --push_to_hub.")
    if args.mixed_precision == "bf16" and torch.backends.mps.is_available():
        problems.append("--mixed_precision bf16 is not supported on MPS: use fp16 or no.")
    logging_dir = Path(args.logging_dir)
    if logging_dir.is_absolute() or ".." in logging_dir.parts or not logging_dir.parts:
        problems.append(f"--logging_dir must name a folder inside --output_dir, got {args.logging_dir!r}.")
    if args.labels_path is not None and not Path(args.labels_path).is_file():
        problems.append(f"--labels_path {args.labels_path} is not a file: write it with relabel_pickapic.py.")
    checkpoints = find_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None:
        found = sorted(path.name for path in Path(args.output_dir).glob("*"))
        if found and not args.overwrite_output_dir:
            problems.append(
                f"--output_dir {args.output_dir} is not empty, it holds {', '.join(found[:5])}: give"
                " --resume_from_checkpoint latest to go on with the run in it, --overwrite_output_dir to start over, or"
                " another folder."
            )
        if args.resume_despite_changes:
            problems.append("--resume_despite_changes does nothing without --resume_from_checkpoint: leave it out.")
    else:
        if args.overwrite_output_dir:
            problems.append("--overwrite_output_dir and --resume_from_checkpoint exclude each other: leave one out.")
        folder = Path(args.resume_from_checkpoint)
        if args.resume_from_checkpoint != "latest" and folder not in find_checkpoints(folder.parent):
            problems.append(f"--resume_from_checkpoint {folder} is not an existing folder named checkpoint-STEP.")
        elif args.resume_from_checkpoint != "latest" and checkpoints and step_of(checkpoints[-1]) > step_of(folder):
            problems.append(
                f"--resume_from_checkpoint {folder} is older than {checkpoints[-1].name} in --output_dir {args.output_dir}:"
                " give another --output_dir, or move the newer ones away."
            )
    if problems:
        raise ValueError("\n".join(problems))

    if args.rank is not None:
        args.lora_alpha = args.lora_alpha or args.rank
        args.lora_layers = args.lora_layers or LORA_LAYERS
    if args.streaming:
        args.shuffle_buffer_size = args.shuffle_buffer_size or SHUFFLE_BUFFER_SIZE
    if args.noising != "forward":
        args.num_inversion_steps = args.num_inversion_steps or NUM_INVERSION_STEPS
        args.inversion_guidance_scale = 1.0 if args.inversion_guidance_scale is None else args.inversion_guidance_scale
        args.renoise_at = args.renoise_at or RENOISE_AT
    if args.resume_from_checkpoint == "latest":
        args.resume_from_checkpoint = str(checkpoints[-1]) if checkpoints else None


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def loading(flag, value, accepted="a Hub name or a folder"):
    """Turns a library's complaint about what a flag names into a `ValueError` with the flag and what it accepts."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {value} cannot be loaded: {error}\nAccepted: {accepted}.") from error


def load_data(name, config_name, split, cache_dir):
    """A split as a `datasets.Dataset`, images left encoded.

    Args:
        name: a Parquet file or glob, a `save_to_disk` folder, a folder of data files, or a Hub name.
        config_name: configuration of a data set that has several, or None.
        split: name of the split.
        cache_dir: folder for downloads and caches, or None.

    Raises:
        ValueError: there is no such data set, or it has no such split.
    """
    folder = Path(name)
    accepted = "a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder"
    with loading("dataset_name", f"{name} --dataset_split_name {split}", accepted):
        if (folder / "dataset_dict.json").is_file():
            splits = load_from_disk(name)
            if split not in splits:
                raise ValueError(f"it has the splits {', '.join(splits)}")
            data = splits[split]
        elif (folder / "state.json").is_file():
            data = load_from_disk(name)
        elif name.endswith(".parquet"):
            data = load_dataset("parquet", data_files={split: name}, split=split, cache_dir=cache_dir)
        else:
            data = load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def find_parquet(name, config_name, split, streaming, cache_dir):
    """The Parquet files that a split consists of, None if it is kept in another way.

    Args:
        name, config_name, split, cache_dir: as for `load_data`.
        streaming: leave files of the Hub there and return their URLs, instead of downloading them.

    Returns:
        Paths or URLs, in the order of the rows.

    Raises:
        ValueError: there is no such data set.
    """
    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return None
    accepted = "a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder"
    with loading("dataset_name", f"{name} --dataset_split_name {split}", accepted):
        if name.endswith(".parquet"):
            builder = load_dataset_builder("parquet", data_files={split: name})
        else:
            builder = load_dataset_builder(name, config_name, cache_dir=cache_dir)
    if builder.name != "parquet" or split not in builder.config.data_files:
        return None
    files = list(builder.config.data_files[split])
    if streaming:
        return files
    return datasets.DownloadManager(download_config=datasets.DownloadConfig(cache_dir=cache_dir)).download(files)


def open_parquet(path):
    """A Parquet file on a disk or behind a URL. However long it is, some pages of each column that is read are held at a time."""
    if "://" in path:
        filesystem, inner_path = fsspec.core.url_to_fs(path)
        path = filesystem.open(inner_path, "rb", cache_type="none")
    return pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)


class ParquetShards:
    """Rows of Parquet files, read where they lie: on a disk, or through fsspec (`hf://`).

    Args:
        files: paths or URLs, in the order of the rows.

    Raises:
        ValueError: some are not whole Parquet files; it names them all.
    """

    def __init__(self, files):
        def footer(path):
            try:
                with open_parquet(path) as file:
                    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                    return file.schema_arrow, groups
            except (OSError, pa.ArrowException) as error:
                return error

        with ThreadPoolExecutor(NUM_READERS) as pool:
            footers = list(pool.map(footer, files))
        broken = [f"{path}: {found}" for path, found in zip(files, footers) if isinstance(found, Exception)]
        if broken:
            listed = "\n".join(broken)
            raise ValueError(
                f"{len(broken)} of {len(files)} Parquet files cannot be read, the rest can:\n{listed}\nFetch them again."
            )
        self.files = list(files)
        self.row_groups = [groups for _, groups in footers]  # rows of each row group of each file
        self.schema = pa.schema([field for field in footers[0][0] if all(field.name in s.names for s, _ in footers)])

    @property
    def column_names(self):
        return self.schema.names

    def __len__(self):
        return sum(map(sum, self.row_groups))

    def read(self, shard, columns, first_row=0):
        """Record batches of some rows of one file, from a row on; row groups before it are not touched."""
        ends = np.cumsum(self.row_groups[shard])
        group = int(np.searchsorted(ends, first_row, side="right"))
        row = sum(self.row_groups[shard][:group])
        with open_parquet(self.files[shard]) as file:
            for batch in file.iter_batches(READ_ROWS, range(group, file.num_row_groups), columns):
                if row + len(batch) > first_row:
                    yield batch.slice(max(0, first_row - row))
                row += len(batch)

    def read_columns(self, columns):
        """Columns of all rows, as a table: for keys and labels, not for images."""

        def read(path):
            with open_parquet(path) as file:
                return file.read(columns)

        with ThreadPoolExecutor(NUM_READERS) as pool:
            bar = tqdm(
                pool.map(read, self.files),
                total=len(self.files),
                desc="Keys",
                unit="file",
                disable=not PartialState().is_local_main_process,
            )
            return pa.concat_tables(bar, promote_options="permissive").replace_schema_metadata()


def in_background(iterator, depth):
    """The items of an iterator, up to `depth` of them fetched ahead by a thread."""
    iterator, end = iter(iterator), object()
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item


class StreamedPairs(ParquetShards):
    """Preference pairs in Parquet files, with what training uses of the interface of `datasets.Dataset`."""

    def select_columns(self, columns):
        pairs = copy.copy(self)
        pairs.schema = pa.schema([self.schema.field(name) for name in columns])
        return pairs

    def __getitem__(self, row):
        """One pair, as a dict. Its row group is read up to there: for the few that are not read in order."""
        shard, first_row = self.place_of(row)
        return next(self.read(shard, self.column_names, first_row)).slice(0, 1).to_pylist()[0]

    def place_of(self, row):
        """The file that a row lies in, and its number there."""
        ends = np.cumsum([sum(groups) for groups in self.row_groups])
        shard = int(np.searchsorted(ends, row, side="right"))
        return shard, int(row - ends[shard] + sum(self.row_groups[shard]))


def open_pairs(args):
    """The pairs of the command line, as a `datasets.Dataset` or, with --streaming, as `StreamedPairs`.

    Raises:
        ValueError: they cannot be read, or are not kept as Parquet files with --streaming.
    """
    source = (args.dataset_name, args.dataset_config_name, args.dataset_split_name)
    if not args.streaming:
        return load_data(*source, args.cache_dir)
    files = find_parquet(*source, True, args.cache_dir)
    if files is None:
        raise ValueError(
            f"--streaming reads Parquet files in place, and --dataset_name {args.dataset_name} has none of the split"
            f" {args.dataset_split_name}: leave it out."
        )
    return StreamedPairs(files)


def read_columns(pairs, columns):
    """Columns of all pairs as an Arrow table: for keys and labels, not for images."""
    if isinstance(pairs, StreamedPairs):
        return pairs.read_columns(columns)
    return pairs.select_columns(columns).with_format("arrow")[:]


def require_columns(columns, flags):
    """Checks that the data set has each column that a flag names.

    Args:
        columns: the columns that there are.
        flags: `{flag: column}`.

    Raises:
        ValueError: with every missing column, its flag, and the columns that there are.
    """
    missing = [f"--{flag} {column}" for flag, column in flags.items() if column not in columns]
    if missing:
        raise ValueError(
            f"The data set has no column for {', '.join(missing)}. It has {', '.join(columns)}: name the right ones."
        )


def decode_image(data):
    """An RGB image of encoded bytes, or of the `{"bytes", "path"}` that a `datasets.Image` column holds.

    It is turned upright by its EXIF orientation; what is transparent becomes white; of an animation it is the first frame.

    Raises:
        ValueError: it is missing, empty, damaged, or so large that Pillow takes it for a decompression bomb.
    """
    try:
        if isinstance(data, dict):
            data = data["bytes"] if data["bytes"] is not None else Path(data["path"]).read_bytes()
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged bytes, with no common base
        text = re.sub(" <_io.BytesIO.*>", "", str(error))  # the same for the same bytes
        raise ValueError(f"not a readable image ({type(error).__name__}: {text})") from error


def join_labels(pairs, labels_path, label_column, key_columns):
    """Labels of a labels file in the order of the pairs.

    Args:
        pairs: P pairs, from `open_pairs`.
        labels_path: Parquet file with the columns `LABEL_KEYS` (`ranking_id` may be missing) and `label_column`.
        label_column: column of the labels file to return.
        key_columns: the columns of `pairs` that stand for `LABEL_KEYS`, in that order; a third one that `pairs` lacks
            is not compared.

    Returns:
        float64 array `[P]`, NaN where the label is null.

    Raises:
        ValueError: a column is missing, a pair has no row in the file, or two rows of one pair contradict each other.
    """
    present = pq.read_schema(labels_path).names
    keys = [key for key, column in zip(LABEL_KEYS, key_columns) if key in present and column in pairs.column_names]
    if label_column not in present or keys[:2] != LABEL_KEYS[:2]:
        raise ValueError(
            f"--labels_path {labels_path} needs the columns {LABEL_KEYS[0]}, {LABEL_KEYS[1]} and {label_column}, and the"
            f" data set {key_columns[0]} and {key_columns[1]}. The file has {', '.join(present)}; the data set has"
            f" {', '.join(pairs.column_names)}. Relabel the data set, or name its columns with --image_0_uid_column,"
            " --image_1_uid_column and --label_column."
        )

    def with_text_keys(table, columns):
        return pa.table({key: pc.cast(table[column], pa.string()) for key, column in zip(keys, columns)})

    labels = pq.read_table(labels_path, columns=[*keys, label_column])
    labels = with_text_keys(labels, keys).append_column("label", pc.cast(labels[label_column], pa.float64()))
    labels = labels.group_by(keys).aggregate([("label", "min"), ("label", "max"), ([], "count_all")])
    rows = read_columns(pairs, [key_columns[LABEL_KEYS.index(key)] for key in keys])
    rows = with_text_keys(rows, rows.column_names).append_column("row", pa.array(np.arange(len(pairs))))
    rows = rows.join(labels, keys=keys, join_type="left outer").sort_by("row")

    def describe(row):
        return f"row {row} of the data set, " + ", ".join(f"{key} {rows[key][row]}" for key in keys)

    unmatched = np.flatnonzero(rows["count_all"].is_null().to_numpy())
    if len(unmatched):
        raise ValueError(
            f"--labels_path {labels_path} has no label for {len(unmatched)} of the {len(pairs)} pairs; the first is"
            f" {describe(unmatched[0])}. Labels and pairs must come from the same data set and split."
        )
    label = rows["label_min"].to_numpy(zero_copy_only=False).astype(np.float64)
    contradicted = np.flatnonzero(label < rows["label_max"].to_numpy(zero_copy_only=False))
    if len(contradicted):
        raise ValueError(
            f"--labels_path {labels_path} has several labels for {describe(contradicted[0])}, from {label[contradicted[0]]}"
            f" to {rows['label_max'][contradicted[0]]}. A pair needs one."
        )
    return label


def column_as_labels(pairs, column):
    """A label column of the data set itself as float64 `[P]`, NaN where it is null."""
    values = read_columns(pairs, [column])[column]
    return pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def select_pairs(pairs, labels_path, args):
    """The pairs worth training on and their labels, from a labels file or, if that is None, from a column.

    Left out are pairs without a label (their images could not be scored), pairs labelled exactly 0.5, whose gradient
    is zero, and pairs that people called a tie (`--human_label_column`).

    Returns:
        Rows of `pairs`, int64 `[K]`, in their order; P(image 0 is preferred) of each, float32 `[K]`.

    Raises:
        ValueError: a column is missing, labels and pairs do not match, a label is not in [0, 1], or no pair is left.
    """
    columns = pairs.column_names
    require_columns(columns, {n: getattr(args, n) for n in ("image_0_column", "image_1_column", "caption_column")})
    if labels_path is not None:
        key_columns = [args.image_0_uid_column, args.image_1_uid_column, args.ranking_id_column]
        labels = join_labels(pairs, labels_path, args.label_column, key_columns)
    elif args.label_column in columns:
        labels = column_as_labels(pairs, args.label_column)
    else:
        raise ValueError(
            f"The data set has no column for --label_column {args.label_column}, and there is no --labels_path. It has"
            f" {', '.join(columns)}: give the labels file of relabel_pickapic.py, or name a column."
        )
    wrong = np.flatnonzero((labels < 0) | (labels > 1))
    if len(wrong):
        raise ValueError(
            f"--label_column {args.label_column} must be a probability in [0, 1], or null: row {wrong[0]} has"
            f" {labels[wrong[0]]}."
        )
    human_labels = np.full(len(pairs), np.nan)
    if args.human_label_column in columns:
        human_labels = column_as_labels(pairs, args.human_label_column)
    labels = labels.astype(np.float32)
    unlabelled, undecided, tied = np.isnan(labels), labels == 0.5, human_labels == 0.5
    rows = np.flatnonzero(~(unlabelled | undecided | tied))
    logger.info(
        f"{len(pairs)} pairs: {unlabelled.sum()} without a label, {undecided.sum()} labelled 0.5 and {tied.sum()} human"
        f" ties are left out, {len(rows)} remain."
    )
    if not len(rows):
        raise ValueError(f"No pair of {args.dataset_name} is left to train on, see the counts above.")
    return rows, labels[rows]


def hold_out(pairs, rows, share, args):
    """Which rows of `pairs` are held out for validation, bool `[K]`: all of some prompts, at least a share of the rows."""
    captions = read_columns(pairs, [args.caption_column])[args.caption_column].combine_chunks()
    prompt_of_row = pc.fill_null(pc.dictionary_encode(captions).indices, -1).to_numpy()[rows]
    prompts, counts = np.unique(prompt_of_row, return_counts=True)
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    num_prompts = 1 + np.searchsorted(np.cumsum(counts[order]), share * len(rows))
    return np.isin(prompt_of_row, prompts[order[:num_prompts]])


def load_pairs(accelerator, args):
    """What to train on and what to validate on, each a data set, rows of it and their labels; None for the second.

    Raises:
        ValueError: see `open_pairs` and `select_pairs`; or there is less than a micro-batch of one.
    """
    with accelerator.main_process_first():
        pairs = open_pairs(args)
    rows, labels = select_pairs(pairs, args.labels_path, args)
    held_out = None
    if (share := share_of(args.validation_split)) is not None:
        chosen = hold_out(pairs, rows, share, args)
        held_out = pairs, rows[chosen], labels[chosen]
        rows, labels = rows[~chosen], labels[~chosen]
    elif args.validation_split is not None:
        source = (args.dataset_name, args.dataset_config_name, args.validation_split, args.cache_dir)
        with loading("validation_split", args.validation_split, "a split of the data set with labels, or a share"):
            with accelerator.main_process_first():
                validation = load_data(*source)
            held_out = validation, *select_pairs(validation, args.validation_labels_path or args.labels_path, args)
    if args.max_train_samples is not None:
        chosen = np.sort(np.random.default_rng(args.seed).permutation(len(rows))[: args.max_train_samples])
        rows, labels = rows[chosen], labels[chosen]

    needed = args.train_batch_size * accelerator.num_processes
    if len(rows) < needed:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} on {accelerator.num_processes} processes needs {needed} pairs, and"
            f" {args.dataset_name} has {len(rows)} to train on: use a smaller batch."
        )
    if held_out is not None and min(len(held_out[1]), args.max_validation_samples) < needed:
        raise ValueError(
            f"--validation_split {args.validation_split} holds {len(held_out[1])} pairs, of which --max_validation_samples"
            f" {args.max_validation_samples} are used; a micro-batch takes {needed}: give more."
        )
    return (pairs, rows, labels), held_out


class PairDataset(torch.utils.data.Dataset):
    """Preference pairs, looked up by (epoch, index).

    Everything random about a pair (mirroring, crop, emptied prompt, timestep, noise) is drawn from (seed, epoch, row of
    the data set), so it depends neither on the batch, nor on the process, nor on where a run was resumed.
    """

    def __init__(self, pairs, rows, soft_labels_0, num_train_timesteps, args):
        self.pairs = pairs.select_columns([args.image_0_column, args.image_1_column, args.caption_column])
        self.rows, self.soft_labels_0 = rows, soft_labels_0
        self.num_train_timesteps = num_train_timesteps
        self.args = args

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        """The pair, or the next one that can be read; `problems` says why those before could not.

        Args:
            key: (epoch, index), or (epoch, index, pair) of a pair that has been fetched already.
        """
        epoch, index, *fetched = key
        problems = []
        for i in range(len(self)):
            row = int(self.rows[(index + i) % len(self)])
            try:
                pair = fetched.pop() if fetched else self.pairs[row]
                return {**self.prepare(pair, epoch, (index + i) % len(self)), "problems": problems}
            except ValueError as error:
                problems.append(f"row {row} of the data set: {error}")
        raise ValueError(
            f"None of the {len(self)} pairs of {self.args.dataset_name} can be read, the last {problems[-1]}."
        )

    def draw(self, epoch, index):
        """Everything random about a pair in an epoch; all of it is drawn in any case, so that no flag changes the rest."""
        rng = np.random.default_rng([self.args.seed, epoch, int(self.rows[index])])
        return {
            "mirror": rng.random() < 0.5,
            "empty": rng.random() < self.args.proportion_empty_prompts,
            "crop": rng.random(2),
            "timestep": int(rng.integers(self.num_train_timesteps)),
            "seeds": rng.integers(2**63, size=3).tolist(),  # posterior of image 0, of image 1, forward noise
        }

    def prepare(self, pair, epoch, index):
        args = self.args
        caption = pair[args.caption_column]
        if not isinstance(caption, str):
            raise ValueError(f"{args.caption_column} is {type(caption).__name__}, not a text")
        images = [decode_image(pair[column]) for column in (args.image_0_column, args.image_1_column)]
        drawn = self.draw(epoch, index)
        crop = drawn["crop"] if args.random_crop else (0.5, 0.5)
        mirror = drawn["mirror"] and not args.no_hflip
        cuts = [cut_square(image, args.resolution, crop, mirror, args.image_interpolation_mode) for image in images]
        return {
            "pixel_values": [pixels for pixels, _ in cuts],
            "image_cond": [
                image_conditions(image.size, top_left, args.resolution) for image, (_, top_left) in zip(images, cuts)
            ],
            "caption": "" if drawn["empty"] else caption,
            "soft_label_0": float(self.soft_labels_0[index]),
            "timestep": drawn["timestep"],
            "seeds": drawn["seeds"],
        }


def cut_square(image, resolution, crop, mirror, interpolation):
    """A square cut of an RGB image, and where it was cut.

    Args:
        image: the image; its shorter side is resized to `resolution`.
        resolution: side of the square, in pixels.
        crop: two numbers in [0, 1], where along height and width the square lies (0.5 is the centre), so that two images
            of unlike size can share it.
        mirror: whether to mirror the square.
        interpolation: one of `INTERPOLATION_MODES`.

    Returns:
        uint8 `[3, resolution, resolution]`; top and left edge of the square in the resized image, which is
        mirrored as the square is.
    """
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    image = image.resize(size, getattr(Image.Resampling, interpolation.upper()))
    top, left = (round(place * (side - resolution)) for place, side in zip(crop, reversed(size)))
    image = image.crop((left, top, left + resolution, top + resolution))
    if mirror:
        image, left = ImageOps.mirror(image), size[0] - resolution - left
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), (top, left)


def image_conditions(original_size, top_left, resolution):
    """What the UNet is told of an image besides its prompt, a dict of tensors: nothing in SD1.5."""
    return {}


def collate_pairs(examples):
    """B pairs as one batch: `pixel_values` uint8 `[2B, 3, H, W]` and each of `image_cond` `[2B, ...]`, images 0 first; B of
    everything else."""

    def of_images(values):
        return torch.stack([value[i] for i in (0, 1) for value in values])

    image_conds = [example["image_cond"] for example in examples]
    return {
        "pixel_values": of_images([example["pixel_values"] for example in examples]),
        "image_cond": {
            key: of_images([[cond[key] for cond in conds] for conds in image_conds]) for key in image_conds[0][0]
        },
        "captions": [example["caption"] for example in examples],
        "soft_label_0": torch.tensor([example["soft_label_0"] for example in examples]),
        "timesteps": torch.tensor([example["timestep"] for example in examples]),
        "seeds": [example["seeds"] for example in examples],
        "problems": [problem for example in examples for problem in example["problems"]],
    }


class PairSampler(torch.utils.data.Sampler):
    """Endless batches of (epoch, index) for one process, each epoch shuffled by (seed, epoch).

    All processes walk the same permutation and take their part of every global batch; a remainder too small for one
    waits for another epoch's shuffle. `start`, a number of micro-batches, goes on where an earlier run stopped.
    """

    def __init__(self, num_pairs, batch_size, num_processes, process_index, seed, start):
        self.num_pairs, self.batch_size, self.seed, self.start = num_pairs, batch_size, seed, start
        self.num_processes, self.process_index = num_processes, process_index
        self.batches_per_epoch = num_pairs // (batch_size * num_processes)

    def __iter__(self):
        epoch, first = divmod(self.start, self.batches_per_epoch)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_pairs)
            for batch in range(first, self.batches_per_epoch):
                begin = (batch * self.num_processes + self.process_index) * self.batch_size
                yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]
            epoch, first = epoch + 1, 0


class PairStream(torch.utils.data.Sampler):
    """Endless batches of (epoch, index, pair) for one process, of `StreamedPairs`, which are read in order.

    In each epoch the row groups are shuffled, and what they hold one after the other is divided evenly among the processes;
    each reads its part and shuffles `buffer_size` pairs at a time. `start`, a number of micro-batches, goes on where an
    earlier run stopped, with the batches that it would have had.
    """

    def __init__(self, dataset, batch_size, num_processes, process_index, seed, start, buffer_size):
        self.pairs, self.rows = dataset.pairs, dataset.rows
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.process_index, self.buffer_size = process_index, buffer_size
        self.pairs_per_epoch = len(self.rows) // num_processes
        self.batches_per_epoch = self.pairs_per_epoch // batch_size
        ends = np.cumsum([num_rows for groups in self.pairs.row_groups for num_rows in groups])
        self.group_of = np.searchsorted(ends, self.rows, side="right")
        self.row_groups = np.split(np.arange(len(self.rows)), np.searchsorted(self.rows, ends[:-1]))

    def __iter__(self):
        epoch, batch = divmod(self.start, self.batches_per_epoch)
        while True:
            # The next buffer is read while this one is used up.
            buffers = in_background(self.buffers(epoch, batch * self.batch_size), 1)
            pairs = itertools.chain.from_iterable(buffers)
            for _ in range(batch, self.batches_per_epoch):
                yield list(itertools.islice(pairs, self.batch_size))
            buffers.close()
            epoch, batch = epoch + 1, 0

    def buffers(self, epoch, first):
        """Lists of (epoch, index, pair) from the first-th pair of this process's epoch on."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.row_groups))
        order = np.concatenate([self.row_groups[i] for i in shuffled])
        order = order[self.process_index * self.pairs_per_epoch :][: self.pairs_per_epoch]
        number, used = divmod(first, self.buffer_size)
        pairs = self.read(order[number * self.buffer_size :])
        while buffer := list(itertools.islice(pairs, self.buffer_size)):
            rng = np.random.default_rng([self.seed, epoch, self.process_index, number])
            yield [(epoch, *buffer[i]) for i in rng.permutation(len(buffer))[used:]]
            number, used = number + 1, 0

    def read(self, order):
        """(index, pair) for each index; those of a row group stand together and ascend."""
        for _, indices in itertools.groupby(order, key=lambda index: self.group_of[index]):
            indices = np.fromiter(indices, dtype=np.int64)
            shard, row = self.pairs.place_of(self.rows[indices[0]])
            rows = self.rows[indices] - self.rows[indices[0]] + row  # in the file
            with loading(
                "dataset_name", f"{self.pairs.files[shard]} after row {row}", "a whole Parquet file: fetch it again"
            ):
                for batch in self.pairs.read(shard, self.pairs.column_names, row):
                    here = (row <= rows) & (rows < row + len(batch))
                    yield from zip(indices[here].tolist(), batch.take(pa.array(rows[here] - row)).to_pylist())
                    row += len(batch)
                    if row > rows[-1]:
                        break


def inversion_batches(keys, dataset, args):
    """Keys of a `PairDataset` in batches to be inverted together: whole micro-batches, `--inversion_batch_size` pairs if
    these are so small. They are sorted by timestep, so that the pairs of a batch make about as many moves and few calls of the
    UNet are small ones."""
    size = args.train_batch_size * max(1, args.inversion_batch_size // args.train_batch_size)
    keys = sorted(keys, key=lambda key: dataset.draw(*key[:2])["timestep"])
    return [keys[first : first + size] for first in range(0, len(keys), size)]


def batches_of_steps(micro_batches, dataset, args):
    """The `inversion_batches` of one optimiser step after the other, of endless micro-batches of keys."""
    micro_batches = iter(micro_batches)
    while True:
        step = itertools.islice(micro_batches, args.gradient_accumulation_steps)
        yield from inversion_batches(itertools.chain.from_iterable(step), dataset, args)


def make_dataloader(accelerator, dataset, global_step, args):
    """Endless batches of this process from an optimiser step on, and how many micro-batches it takes in an epoch."""
    sampling = {
        "batch_size": args.train_batch_size,
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "seed": args.seed,
        "start": global_step * args.gradient_accumulation_steps,
    }
    if args.streaming:
        sampler = PairStream(dataset, buffer_size=args.shuffle_buffer_size, **sampling)
    else:
        sampler = PairSampler(len(dataset), **sampling)
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches_of_steps(sampler, dataset, args),
        collate_fn=collate_pairs,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_stop,
        pin_memory=accelerator.device.type == "cuda",
    )
    return dataloader, sampler.batches_per_epoch


# ---------------------------------------------------------------------------------------------------------------------
# Models, prompts, and the seam to the UNet
# ---------------------------------------------------------------------------------------------------------------------


def source_of(part, network_class, args):
    """Where a network comes from: --pretrained_PART_model_name_or_path if it is given, or else the base model.

    Args:
        part: "unet" or "vae".
        network_class: its diffusers class.
        args: the command line.

    Returns:
        Its flag and name, the arguments for `from_pretrained`, and its configuration as a dict.

    Raises:
        ValueError: there is no such network, or it is of another class.
    """
    flag = f"pretrained_{part}_model_name_or_path"
    name, source = getattr(args, flag), {"cache_dir": args.cache_dir}
    if name is None:
        flag, name = "pretrained_model_name_or_path", args.pretrained_model_name_or_path
        source.update(revision=args.revision, variant=args.variant, subfolder=part)
    with loading(flag, name):
        try:
            config = network_class.load_config(name, **source)
        except OSError:
            source["subfolder"] = part
            config = network_class.load_config(name, **source)
        if config.get("_class_name") != network_class.__name__:
            raise ValueError(f"its {part} is a {config.get('_class_name')}, not a {network_class.__name__}")
    return flag, name, source, config


def load_network(part, network_class, dtype, args):
    """The UNet or VAE that `source_of` finds, in `dtype`.

    Raises:
        ValueError: it cannot be loaded.
    """
    flag, name, source, _ = source_of(part, network_class, args)
    with loading(flag, name):
        return network_class.from_pretrained(name, torch_dtype=dtype, use_safetensors=True, **source)


def check_models(args):
    """Refuses models that the method or this script is not made for, by their configurations, before weights are loaded.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    name, source = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    with loading("pretrained_model_name_or_path", name, ACCEPTED_MODELS):
        index = PIPELINE.load_config(name, **source)
        missing = [part for part in TOKENIZERS + TEXT_ENCODERS if index.get(part, [None])[0] is None]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}")
    flag, name, _, unet = source_of("unet", UNet2DConditionModel, args)
    vae = source_of("vae", AutoencoderKL, args)[-1]
    with loading(flag, name, ACCEPTED_MODELS):
        if unet.get("addition_embed_type") != ADDITION_EMBED_TYPE:
            raise ValueError(f"its UNet has addition_embed_type {unet.get('addition_embed_type')}")
        if unet.get("time_cond_proj_dim") is not None:
            raise ValueError("its UNet takes the guidance scale as an input, as a latent consistency model does")
        if unet["in_channels"] != vae["latent_channels"]:
            raise ValueError(
                f"its UNet takes {unet['in_channels']} channels and the VAE has {vae['latent_channels']}, as in a model for"
                " inpainting or editing"
            )


def load_noise_schedule(args):
    """alpha_bar of the base model's scheduler, fp32 `[T]`. Sets `args.prediction_type` if the command line does not.

    Raises:
        ValueError: the scheduler is of a kind that has no alpha_bar, or the flags of the method do not fit it.
    """
    name, source = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    with loading("pretrained_model_name_or_path", name, "a model with a noise schedule of betas, as DDPM's"):
        config = DDPMScheduler.load_config(name, subfolder="scheduler", **source)
        kind = config["_class_name"]
        if not config.get("beta_schedule") or kind.startswith("EDM"):
            raise ValueError(f"its scheduler is a {kind}")
        alpha_bar = DDPMScheduler.from_config(config).alphas_cumprod.float()
    args.prediction_type = args.prediction_type or config.get("prediction_type", "epsilon")
    if args.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"The scheduler of {name} says prediction_type {args.prediction_type}; epsilon and v_prediction are supported:"
            " name one with --prediction_type if the scheduler is wrong."
        )
    if args.noising != "forward":
        inversion_timesteps(0, args.num_inversion_steps, len(alpha_bar))  # raises if there are too many moves
    return alpha_bar


def load_models(args, device, weight_dtype):
    """The models: VAE and text encoder frozen in `weight_dtype`, the UNet in fp32, or for LoRA like the rest.

    Returns:
        A dict of `unet`, `vae`, `tokenizer`, `text_encoder`, and `uncond`, the condition of an empty prompt for guidance.
        With --offload only the UNet stays on `device`.

    Raises:
        ValueError: one cannot be loaded.
    """
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    name = args.pretrained_model_name_or_path
    models = {}
    with loading("pretrained_model_name_or_path", name):
        models["tokenizer"] = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **source)
        models["text_encoder"] = CLIPTextModel.from_pretrained(
            name, subfolder="text_encoder", variant=args.variant, use_safetensors=True, **source
        ).to(device, weight_dtype)
    models["uncond"] = encode_prompts([""], models)
    models["vae"] = load_network("vae", AutoencoderKL, weight_dtype, args)
    for part in ["vae", *TEXT_ENCODERS]:
        models[part].requires_grad_(False).to("cpu" if args.offload else device)
    unet_dtype = torch.float32 if args.rank is None else weight_dtype
    models["unet"] = load_network("unet", UNet2DConditionModel, unet_dtype, args).to(device)
    return models


def load_reference(args, device, weight_dtype, round_norms=False):
    """The frozen reference for full fine-tuning, rounded exactly as the policy is.

    Autocast rounds convolutions and linear layers, so that only these are held in `weight_dtype`; DeepSpeed's policy has
    rounded norms too (`round_norms`). Otherwise the reference would not be the policy's start, and beta magnifies the
    difference.
    """
    ref_unet = load_network("unet", UNet2DConditionModel, torch.float32, args).requires_grad_(False)
    for module in ref_unet.modules():
        if round_norms or isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(weight_dtype)
    return ref_unet.to("cpu" if args.offload else device)


def add_lora(unet, args):
    """Freezes the UNet and gives it a LoRA in fp32 that changes nothing yet.

    Raises:
        ValueError: the UNet has no such layers.
    """
    unet.requires_grad_(False)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=args.lora_layers.split(","),
    )
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise ValueError(f"--lora_layers {args.lora_layers}: {error}") from error
    cast_training_params(unet, dtype=torch.float32)


@torch.no_grad()
def encode_prompts(captions, models):
    """Conditioning of a UNet for B captions, cut at the tokenizer's length: a dict of tensors whose first axis is B."""
    tokenizer, text_encoder = models["tokenizer"], models["text_encoder"]
    input_ids = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return {"encoder_hidden_states": text_encoder(input_ids.to(text_encoder.device)).last_hidden_state}


def predict_noise(unet, x_t, t, cond):
    """What the UNet predicts for latents `x_t` `[N, C, h, w]` at timesteps `t` `[N]`.

    `cond` holds `encoder_hidden_states` `[N, S, D]`, from `encode_prompts`.
    """
    return unet(x_t, t, encoder_hidden_states=cond["encoder_hidden_states"]).sample


@contextmanager
def reference_of(unet, ref_unet, device, args):
    """The reference model: the frozen copy, or in LoRA training (no copy) the policy with its adapter switched off."""
    if ref_unet is not None:
        with offload_models(ref_unet, device=device, offload=args.offload):
            yield ref_unet
        return
    adapted = unet.module if hasattr(unet, "module") else unet
    adapted.disable_adapters()
    try:
        yield unet
    finally:
        adapted.enable_adapters()


# ---------------------------------------------------------------------------------------------------------------------
# One training step
# ---------------------------------------------------------------------------------------------------------------------


def seeded_noise(seeds, shape):
    """Standard normal noise `[len(seeds), *shape]`, fp32 on the CPU, row i drawn from `seeds[i]` alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def encode_images(pixel_values, vae, batch_size, seeds):
    """Scaled latents x_0 of images, a sample of the VAE's posterior, `batch_size` of them at a time.

    Args:
        pixel_values: uint8 `[N, 3, H, W]`; the VAE sees them in [-1, 1].
        vae: the VAE.
        batch_size: how many images it encodes at a time.
        seeds: of each image's draw from the posterior, N integers.

    Returns:
        fp32 `[N, 4, H / 8, W / 8]`.
    """
    pixel_values = pixel_values.to(vae.device, non_blocking=True)
    posteriors = [
        vae.encode((images.float() / 127.5 - 1).to(vae.dtype)).latent_dist for images in pixel_values.split(batch_size)
    ]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float()
    std = torch.cat([posterior.std for posterior in posteriors]).float()
    noise = seeded_noise(seeds, mean.shape[1:]).to(mean.device)
    return (mean + std * noise) * vae.config.scaling_factor


def predict_eps(unet, x_t, t, cond, alpha_bar, autocast, args):
    """Noise fp32 `[N, C, h, w]` that a UNet sees in `x_t` `[N, C, h, w]` at `t` `[N]`, in the context `autocast()`."""
    with autocast():
        model_pred = predict_noise(unet, x_t, t, cond).float()
    return noise_from_prediction(model_pred, x_t, alpha_bar[t], args.prediction_type)


@torch.no_grad()
def prepare_micro_batches(batch, models, alpha_bar, autocast, args, calls_behind=None):
    """The part of the paper's algorithm that has no gradient: x_t of each image, tau, and the reference's errors.

    Within an optimiser step the policy does not change, so that this part is done for many micro-batches together.

    Args:
        batch: P pairs, from `collate_pairs`.
        models: from `load_models`, and `ref_unet` (None in LoRA training).
        alpha_bar: fp32 `[T]`, on the device of the models.
        autocast: `autocast()` is the context that every UNet runs in, policy and reference alike, so that rounding is the
            same in both and the two are equal before the first step.
        args: the command line.
        calls_behind: under FSDP, where every call of the policy exchanges weights between all processes and each process
            has moves of its own to make, says by how many calls this one is behind the one that makes most.

    Returns:
        A list of dicts for `training_step`, of `--train_batch_size` pairs each.
    """
    unet, device = models["unet"], alpha_bar.device
    seeds_0, seeds_1, noise_seeds = zip(*batch["seeds"])
    with offload_models(models["vae"], device=device, offload=args.offload):
        x_0 = encode_images(
            batch["pixel_values"], models["vae"], args.vae_encode_batch_size, seeds_0 + seeds_1
        )  # [2P, C, h, w]
    with offload_models(*(models[part] for part in TEXT_ENCODERS), device=device, offload=args.offload):
        prompt_cond = encode_prompts(batch["captions"], models)
    cond = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in prompt_cond.items()}
    cond.update({key: value.to(device) for key, value in batch["image_cond"].items()})
    t = batch["timesteps"].repeat(2)  # on the CPU, so that the inversion can be laid out without waiting for the GPU
    t_device = t.to(device)

    def policy_eps(x, t, rows):
        rows_cond = {key: value[rows] for key, value in cond.items()}
        eps_cond = predict_eps(unet, x, t, rows_cond, alpha_bar, autocast, args)
        if args.inversion_guidance_scale == 1:
            return eps_cond
        uncond = {key: value.expand(len(x), *value.shape[1:]) for key, value in models["uncond"].items()}
        eps_uncond = predict_eps(unet, x, t, {**rows_cond, **uncond}, alpha_bar, autocast, args)
        return eps_uncond + args.inversion_guidance_scale * (eps_cond - eps_uncond)

    if args.noising == "forward":
        noise = seeded_noise(noise_seeds, x_0.shape[1:]).to(device)
        x_t = add_noise(x_0, noise.repeat(2, 1, 1, 1), alpha_bar[t_device])
    else:
        inversion = (args.num_inversion_steps, args.noising, args.renoise_at)
        extra_calls = 0 if calls_behind is None else calls_behind(num_inversion_calls(t, alpha_bar, *inversion))
        # Autocast rounds each weight once within its outermost context. Under FSDP that would gather all of them.
        with autocast() if calls_behind is None else nullcontext():
            x_t = invert(policy_eps, x_0, t, alpha_bar, *inversion)
        for _ in range(extra_calls):
            policy_eps(x_0[:1], t_device[:1], torch.zeros_like(t_device[:1]))
    tau = implied_noise(x_0, x_t, alpha_bar[t_device])
    with reference_of(unet, models["ref_unet"], device, args) as reference:
        ref_eps = predict_eps(reference, x_t, t_device, cond, alpha_bar, autocast, args)
    of_images = {"x_t": x_t, "timesteps": t_device, "tau": tau, "ref_errors": squared_errors(ref_eps, tau)}

    soft_label_0, micro_batches = batch["soft_label_0"].to(device), []
    for pairs in torch.arange(len(soft_label_0), device=device).split(args.train_batch_size):
        images = torch.cat([pairs, pairs + len(soft_label_0)])
        micro_batch = {key: value[images] for key, value in of_images.items()}
        micro_batch["cond"] = {key: value[images] for key, value in cond.items()}
        micro_batches.append({**micro_batch, "soft_label_0": soft_label_0[pairs]})
    return micro_batches


def squared_errors(eps, tau):
    """Mean squared error of each predicted noise, `[N]`."""
    return (eps - tau).pow(2).mean(dim=(1, 2, 3))


def training_step(micro_batch, unet, alpha_bar, autocast, args):
    """The part of the paper's algorithm that has a gradient: the policy's errors, and the loss.

    Args:
        micro_batch: B pairs, from `prepare_micro_batches`.
        unet: the policy.
        alpha_bar, autocast, args: as for `prepare_micro_batches`.

    Returns:
        The loss, and the metrics of the micro-batch as a dict of detached scalars.
    """
    x_t, t, cond, tau = (micro_batch[key] for key in ("x_t", "timesteps", "cond", "tau"))
    model_errors = squared_errors(predict_eps(unet, x_t, t, cond, alpha_bar, autocast, args), tau)  # [2B]
    ref_errors, soft_label_0 = micro_batch["ref_errors"], micro_batch["soft_label_0"]
    loss, logits = smpo_loss(model_errors, ref_errors, soft_label_0, args.beta_dpo, args.gamma)
    return loss, metrics_of(loss, logits, model_errors, ref_errors, soft_label_0, tau, args)


@torch.no_grad()
def metrics_of(loss, logits, model_errors, ref_errors, soft_label_0, tau, args):
    """What is logged of a micro-batch, each a scalar that may be averaged over micro-batches and processes.

    The implicit reward of an image is -0.5 beta (policy error - reference error). Accuracy counts the pairs whose
    preferred image (by the label) has the higher one, an exact tie as a half.
    """
    prefers_0 = soft_label_0 > 0.5
    model_0, model_1 = model_errors.chunk(2)
    ref_0, ref_1 = ref_errors.chunk(2)
    weight = args.gamma * (2 * soft_label_0 - 1).abs()
    sign = torch.where(prefers_0, 1.0, -1.0)
    metrics = {
        "loss": loss,
        "implicit_accuracy": ((logits > 0).float() + 0.5 * (logits == 0).float()).mean(),
        "reward_margin": (-0.5 * args.beta_dpo * sign * ((model_0 - ref_0) - (model_1 - ref_1))).mean(),
        "model_error_preferred": torch.where(prefers_0, model_0, model_1).mean(),
        "model_error_rejected": torch.where(prefers_0, model_1, model_0).mean(),
        "ref_error_preferred": torch.where(prefers_0, ref_0, ref_1).mean(),
        "ref_error_rejected": torch.where(prefers_0, ref_1, ref_0).mean(),
        "std_tau": tau.flatten(1).std(dim=1).mean(),
    }
    for name, (low, high) in WEIGHT_BINS.items():
        metrics[f"weight/{name}"] = (weight * ((weight >= low) & (weight < high))).mean()
    return {key: value.detach().float() for key, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, checkpoints, validation, output
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(parameters, learning_rate, args):
    """The optimiser that --optimizer and --use_8bit_adam name.

    Raises:
        ValueError: bitsandbytes is asked for and not installed.
    """
    if args.optimizer == "adafactor":
        return transformers.Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=args.adam_weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **({} if args.use_8bit_adam else {"fused": True}),  # one pass over the weights
    )


def step_of(checkpoint):
    """The optimiser step of a folder named `checkpoint-STEP`."""
    return int(Path(checkpoint).name.split("-")[1])


def find_checkpoints(output_dir):
    """The complete checkpoints of an output folder, folders named `checkpoint-STEP`, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def save_lora(unet, folder):
    """Writes the LoRA of a UNet as `pytorch_lora_weights.safetensors`, which any diffusers pipeline loads."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    layers = {name: value.contiguous() for name, value in layers.items()}  # convolutions may be channels_last
    metadata = _collate_lora_metadata({"unet": unet})  # holds lora_alpha; without it a loader takes alpha = rank
    PIPELINE.save_lora_weights(folder, unet_lora_layers=layers, **metadata)


def save_kohya_lora(unet, folder, lora_alpha):
    """Writes the LoRA of a UNet as `KOHYA_LORA_FILE`, by the names of kohya-ss' sd-scripts, each layer with its alpha."""
    layers = {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}
    layers = convert_state_dict_to_kohya(layers)
    for name in layers:
        if name.endswith(".alpha"):
            layers[name] = torch.tensor(float(lora_alpha))  # the conversion takes the rank for it
    save_file({name: value.contiguous() for name, value in layers.items()}, Path(folder) / KOHYA_LORA_FILE)


def load_lora(unet, folder):
    """Loads what `save_lora` wrote into the adapter that the UNet already has.

    Raises:
        ValueError: the file's LoRA does not fit the adapter (another rank or other layers).
    """
    state_dict, _ = PIPELINE.lora_state_dict(folder, weight_name=LORA_FILE)
    state_dict = {key.removeprefix("unet."): value for key, value in state_dict.items() if key.startswith("unet.")}
    state_dict = convert_unet_state_dict_to_peft(state_dict)
    own = get_peft_model_state_dict(unet)
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in state_dict.items()}:
        raise ValueError(f"{folder}: its LoRA does not fit --rank and --lora_layers of this run.")
    set_peft_model_state_dict(unet, state_dict, adapter_name="default")
    cast_training_params(unet, dtype=torch.float32)


def plain_unet(accelerator, model):
    """The UNet inside a prepared model, its weights whole and in the precision that the optimiser holds.

    All processes call it. Under FSDP and DeepSpeed it is a copy that the main process alone gets.
    """
    unet = accelerator.unwrap_model(model)
    if accelerator.distributed_type == DistributedType.FSDP:
        state_dict = accelerator.get_state_dict(model)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        state_dict = {name: safe_get_full_fp32_param(parameter) for name, parameter in unet.named_parameters()}
    else:
        return unet._orig_mod if is_compiled_module(unet) else unet
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(state_dict, assign=True)
    return plain


def follow_layout(optimizer):
    """Gives the loaded state of an AdamW the memory layout of its parameters, as its fused step takes for granted.

    The two differ if the run was saved in another precision, see `set_up_unets`.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def register_checkpoint_hooks(accelerator, args):
    """Makes accelerate save the policy as a diffusers UNet or LoRA, and load it from there.

    Under FSDP and DeepSpeed accelerate saves and loads shards besides.
    """

    def save_hook(models, weights, output_dir):
        for model in models:
            unet = plain_unet(accelerator, model)
            if accelerator.is_main_process:
                if args.rank is None:
                    unet.save_pretrained(Path(output_dir) / "unet")
                else:
                    save_lora(unet, output_dir)
            if weights:
                weights.pop()

    def load_hook(models, input_dir):
        while models:
            unet = plain_unet(accelerator, models.pop())
            if args.rank is None:
                saved = UNet2DConditionModel.from_pretrained(
                    input_dir, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True
                )
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


def remove_checkpoint(folder):
    """Deletes a checkpoint; one that is only half deleted no longer has the name of a checkpoint."""
    doomed = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def save_checkpoint(accelerator, step, record, args):
    """Saves all that a resumed run needs as `checkpoint-STEP`, then removes the oldest checkpoints over the limit.

    All processes call it, and share the folder. What a killed run was still writing or deleting is named
    `partial-checkpoint-STEP`; whatever is named `checkpoint-STEP` is complete.
    """
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(f"partial-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=2))
        sync_to_disk(*partial.rglob("*"), partial)
        partial.rename(folder)
        sync_to_disk(folder.parent)
        if args.checkpoints_total_limit is not None:
            for old in find_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                if old.name != read_best(args)["checkpoint"]:
                    remove_checkpoint(old)
    accelerator.wait_for_everyone()


def start_output(record, args):
    """Makes the output folder, clears away what a killed or an overwritten run left there, and writes the record."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    leftovers = list(folder.glob("partial-checkpoint-*"))
    if args.overwrite_output_dir:
        names = [args.logging_dir, "validation", "unet", "model_index.json", LORA_FILE, KOHYA_LORA_FILE, BEST_FILE]
        leftovers += find_checkpoints(folder) + [folder / name for name in names if (folder / name).exists()]
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2))


def stopped_by(too_many_bad, drawn, problems, logs, step, args):
    """The error that ends a run whose data or whose numbers are beyond use; it names the last checkpoint."""
    checkpoints = find_checkpoints(args.output_dir)
    kept = f"The last checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."
    if too_many_bad:
        reason = f" The last: {problems[-1]}." if problems else ""
        return ValueError(
            f"{logs['skipped_pairs']} of the {drawn} pairs drawn so far cannot be read, more than --max_bad_fraction"
            f" {args.max_bad_fraction}.{reason} {kept} Mend the data or allow more, and resume."
        )
    return RuntimeError(
        f"Loss or gradient was not finite in {args.max_nonfinite_steps} steps in a row, up to step {step}; these steps changed"
        f" nothing. {kept} Resume with a lower --learning_rate or in bf16, or allow more --max_nonfinite_steps."
    )


def record_of_run(accelerator, rows, soft_labels_0, args):
    """What a run is, for `RECORD_FILE`: its flags, its data, the machine's part in it, and the versions of the libraries."""
    return {
        "args": {name: value for name, value in vars(args).items() if name != "hub_token"},
        "run": {
            "mixed_precision": accelerator.mixed_precision,
            "num_processes": accelerator.num_processes,
            "pairs": len(rows),
            "pairs_and_labels_sha256": hashlib.sha256(rows.tobytes() + soft_labels_0.tobytes()).hexdigest(),
        },
        "versions": versions(),
    }


def require_same_run(record, args):
    """Checks that --resume_from_checkpoint goes on with the run that it was saved in.

    Raises:
        ValueError: with every flag and fact in which they differ, unless --resume_despite_changes.
    """
    path = Path(args.resume_from_checkpoint) / RECORD_FILE
    with loading("resume_from_checkpoint", args.resume_from_checkpoint, "a checkpoint-STEP folder of this script"):
        saved = json.loads(path.read_text())
    free = set(FREE_FLAGS)
    if args.lr_scheduler in ("constant", "constant_with_warmup", "piecewise_constant"):
        free |= {"max_train_steps", "num_train_epochs"}  # the others stretch the schedule over the steps
    then, now = (
        {**{f"--{name}": v for name, v in r["args"].items() if name not in free}, **r["run"]} for r in (saved, record)
    )
    changes = [f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
    if changes and not args.resume_despite_changes:
        listed = "\n".join(changes)
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is of another run:\n{listed}\nGive what it was started"
            " with, or --resume_despite_changes, or start a run in another --output_dir."
        )
    for change in changes:
        logger.warning(f"Resumed despite a change. {change}")


def listen_for_stop():
    """From now on SIGTERM, SIGUSR1 (Slurm's warning) and a first Ctrl-C only put their names into the list returned.

    The run stops after its optimiser step. A second Ctrl-C interrupts at once.
    """
    caught = []

    def catch(number, frame):
        caught.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), catch)
    return caught


def ignore_stop(worker):
    """Lets a data loading process outlive the signals that its parent listens for; it ends with its parent."""
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def make_pipeline(unet, args, **parts):
    """A pipeline of the base model with another UNet; `parts` replace further parts of it."""
    pipeline = PIPELINE.from_pretrained(
        args.pretrained_model_name_or_path,
        unet=unet,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        use_safetensors=True,
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw_validation(accelerator, unet, models, args):
    """Images of one UNet for the validation prompts, the same seeds every time: a list of a list a prompt."""
    unet = accelerator.unwrap_model(unet)
    was_training = unet.training
    unet.eval()
    parts = {part: models[part] for part in ["vae", *TOKENIZERS, *TEXT_ENCODERS]}
    pipeline = make_pipeline(unet, args, **parts, **PIPELINE_OPTIONS)
    vae = models["vae"]
    images = []
    with offload_models(
        vae, *(models[part] for part in TEXT_ENCODERS), device=accelerator.device, offload=args.offload
    ):
        for prompt in args.validation_prompts:
            generators = [
                torch.Generator(accelerator.device).manual_seed(args.seed + i)
                for i in range(args.num_validation_images)
            ]
            with accelerator.autocast():
                latents = pipeline(
                    [prompt] * args.num_validation_images,
                    height=args.resolution,
                    width=args.resolution,
                    guidance_scale=args.validation_guidance_scale,
                    num_inference_steps=args.validation_inference_steps,
                    generator=generators,
                    output_type="latent",
                ).images
            # In the VAE's own precision: autocast would take a VAE in fp32 down with it.
            latents = (latents / vae.config.scaling_factor).to(vae.dtype)
            decoded = torch.cat([vae.decode(latent).sample for latent in latents.split(1)])
            images.append(pipeline.image_processor.postprocess(decoded))
    unet.train(was_training)
    del pipeline
    free_memory()
    return images


def side_by_side(base_images, tuned_images, prompts):
    """One picture: a row a prompt with its text above, each base image left of the tuned one at the same seed.

    `base_images` and `tuned_images` are a list of images for each prompt, all of one size; small ones are enlarged.
    """
    width, height = base_images[0][0].size
    zoom = max(1, 192 // width)
    width, height = zoom * width, zoom * height
    columns = 2 * len(base_images[0])
    texts = [textwrap.fill(f"base | tuned: {prompt}", columns * width // 6) for prompt in prompts]  # 6 pixels a letter
    text_height = 8 + 15 * max(text.count("\n") + 1 for text in texts)
    sheet = Image.new("RGB", (columns * width, len(prompts) * (height + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(texts):
        top = row * (height + text_height)
        draw.multiline_text((4, top + 4), text, fill="black", font_size=10)
        for i, pair in enumerate(zip(base_images[row], tuned_images[row])):
            for j, image in enumerate(pair):
                sheet.paste(
                    image.resize((width, height), Image.Resampling.NEAREST), ((2 * i + j) * width, top + text_height)
                )
    return sheet


def log_validation(accelerator, base_images, policy_images, step, args):
    """Writes base and policy side by side to `validation/step-STEP.png` and to the trackers; returns the file."""
    pictured = (part[:NUM_PICTURED_PROMPTS] for part in (base_images, policy_images, args.validation_prompts))
    sheet = side_by_side(*pictured)
    path = Path(args.output_dir) / "validation" / f"step-{step}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", np.asarray(sheet)[None], step, dataformats="NHWC")
        if tracker.name == "wandb":
            tracker.log({"validation": wandb.Image(str(path))}, step=step)
    return path


@torch.no_grad()
def validate_pairs(dataset, accelerator, step_context):
    """Means of `metrics_of` over held-out pairs, as `validation/METRIC`, the same pairs, timesteps and noise every time.

    The pairs are a multiple of what the processes take at a time, as they have to take the same number of steps.
    """
    models, alpha_bar, autocast, args, _ = step_context
    size, num_processes = args.train_batch_size, accelerator.num_processes
    num_batches = min(len(dataset), args.max_validation_samples) // (size * num_processes)
    order = np.random.default_rng(args.seed).permutation(len(dataset))[: num_batches * size * num_processes]
    mine = order.reshape(num_batches, num_processes, size)[:, accelerator.process_index]
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=inversion_batches([(0, int(index)) for index in mine.flatten()], dataset, args),
        collate_fn=collate_pairs,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_stop,
    )
    values = []
    for batch in dataloader:
        for micro_batch in prepare_micro_batches(batch, *step_context):
            _, metrics = training_step(micro_batch, models["unet"], alpha_bar, autocast, args)
            values.append(torch.stack(list(metrics.values())))
    means = accelerator.reduce(torch.stack(values).mean(dim=0), "mean").tolist()
    kept = ("loss", "implicit_accuracy", "reward_margin", "std_tau")
    return {f"validation/{name}": mean for name, mean in zip(metrics, means) if name in kept}


def wins(scores, base_scores):
    """1 where a score is higher than the base's, 0 where it is lower, 0.5 at a tie; arrays of any one shape.

    >>> wins(np.array([3.0, 1.0, 2.0]), np.array([2.0, 2.0, 2.0]))
    array([1. , 0. , 0.5])
    """
    return (scores > base_scores) + 0.5 * (scores == base_scores)


def unit_features(features):
    """Features `[N, D]` of `get_image_features` or `get_text_features` as fp32 rows of length 1."""
    if not isinstance(features, torch.Tensor):
        features = features.pooler_output  # transformers 5 returns an output object
    return torch.nn.functional.normalize(features.float(), dim=-1)


@torch.no_grad()
def embed_images(model, pixel_values):
    """Embeddings of preprocessed images `[N, 3, H, W]`: fp32 `[N, D]`, each of length 1."""
    return unit_features(model.get_image_features(pixel_values=pixel_values.to(model.device, model.dtype)))


@torch.no_grad()
def embed_texts(model, processor, texts):
    """Embeddings of texts, cut at the model's length (77 tokens for CLIP): fp32 `[N, D]`, each of length 1."""
    max_length = model.config.text_config.max_position_embeddings
    tokens = processor.tokenizer(
        texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )
    return unit_features(model.get_text_features(**tokens.to(model.device)))


def load_validation_reward(dtype, args):
    """The model of --validation_reward_model, on the CPU, and its processor.

    Raises:
        ValueError: it cannot be loaded, or is not a CLIP-style model.
    """
    name = args.validation_reward_model
    processor_name = PICKSCORE_PROCESSOR if name == PICKSCORE else name
    with loading("validation_reward_model", name):
        model = AutoModel.from_pretrained(name, cache_dir=args.cache_dir).requires_grad_(False).eval().to(dtype)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ValueError(f"it is a {type(model).__name__}, not a CLIP-style model")
        return model, AutoProcessor.from_pretrained(processor_name, cache_dir=args.cache_dir)


def score_validation(images, reward, device, args):
    """Rewards, 100 times the cosine, of the images of `draw_validation`: float64 `[prompts, images]`."""
    model, processor = reward
    scores = []
    with offload_models(model, device=device, offload=True):
        for prompt, drawn in zip(args.validation_prompts, images):
            pixel_values = processor.image_processor(images=drawn, return_tensors="pt")["pixel_values"]
            scores.append((embed_images(model, pixel_values) * embed_texts(model, processor, [prompt])).sum(-1).cpu())
    return 100 * torch.stack(scores).double().numpy()


def read_best(args):
    """The best validated model so far: `win_rate`, `median_reward`, `step` and `checkpoint`, the name of its folder or None."""
    path = Path(args.output_dir) / BEST_FILE
    return json.loads(path.read_text()) if path.is_file() else {"win_rate": -1, "checkpoint": None}


def compare_rewards(policy, base, step, args):
    """Metrics of the policy's rewards `[prompts, images]` against the base's; what is best so far goes into `BEST_FILE`."""
    metrics = {"win_rate": float(wins(policy, base).mean()), "median_reward": float(np.median(policy))}
    best = read_best(args)
    if metrics["win_rate"] > best["win_rate"]:
        checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
        best = {**metrics, "step": step, "checkpoint": checkpoint.name if checkpoint.is_dir() else None}
        partial = Path(args.output_dir) / f".{BEST_FILE}.tmp"
        partial.write_text(json.dumps(best, indent=2))
        partial.replace(partial.with_name(BEST_FILE))  # whole or not at all
    metrics["base_median_reward"] = float(np.median(base))
    logger.info(f"Step {step}: {metrics}; the best win rate so far is {best['win_rate']:.3f}, of step {best['step']}.")
    return {f"validation/{name}": value for name, value in metrics.items()}


class Validation:
    """What --validation_split and --validation_prompts ask for; the base model's part of it is done once.

    Args:
        accelerator: of the run.
        held_out: `PairDataset` of the held-out pairs, or None.
        reward: from `load_validation_reward`, or None.
        step_context: what `prepare_micro_batches` takes besides a batch.
    """

    def __init__(self, accelerator, held_out, reward, step_context):
        self.accelerator, self.held_out, self.reward, self.step_context = accelerator, held_out, reward, step_context
        self.base_images = self.base_rewards = None
        self.step = self.picture = None  # of the newest validation; the picture's file

    def run(self, step):
        """Logs and returns the metrics of an optimiser step. All processes call it, as FSDP needs them for a forward pass."""
        accelerator, (models, *_, args, _), metrics = self.accelerator, self.step_context, {}
        self.step = step
        if self.held_out is not None:
            metrics = validate_pairs(self.held_out, accelerator, self.step_context)
        if args.validation_prompts:
            unet, device = models["unet"], accelerator.device
            if self.base_images is None:
                with reference_of(unet, models["ref_unet"], device, args) as reference:
                    self.base_images = draw_validation(accelerator, reference, models, args)
            images = draw_validation(accelerator, unet, models, args)
            if accelerator.is_main_process:
                self.picture = log_validation(accelerator, self.base_images, images, step, args)
                if self.reward is not None:
                    if self.base_rewards is None:
                        self.base_rewards = score_validation(self.base_images, self.reward, device, args)
                    rewards = score_validation(images, self.reward, device, args)
                    metrics.update(compare_rewards(rewards, self.base_rewards, step, args))
        if metrics:
            accelerator.log(metrics, step=step)
        return metrics


def save_model_card(args, metrics, picture):
    """Writes README.md of the output folder: what was trained from what, on what, how, and how to load it."""
    lora = args.rank is not None
    ours, base = args.hub_model_id or args.output_dir, args.pretrained_model_name_or_path
    load = f'pipeline = {PIPELINE.__name__}.from_pretrained("{base if lora else ours}")'
    if lora:
        load += f'\npipeline.load_lora_weights("{ours}")'
    data = ModelCardData(
        base_model=None if Path(base).exists() else base,
        datasets=[args.dataset_name] if re.fullmatch(r"[\w.-]+/[\w.-]+", args.dataset_name) else None,
        library_name="diffusers",
        license=MODEL_LICENSE,
        pipeline_tag="text-to-image",
        tags=[MODEL_TAG, "text-to-image", "diffusers", "diffusers-training", "dpo", "smpo"]
        + (["lora"] if lora else []),
    )
    recipe = {name: value for name, value in sorted(vars(args).items()) if value is not None and name != "hub_token"}
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# SmPO-Diffusion {'LoRA' if lora else 'fine-tuning'} of {base}",
        "Trained on preference pairs with [SmPO-Diffusion](https://arxiv.org/abs/2506.02698) (Smoothed Preference"
        f" Optimization via ReNoise Inversion, ICML 2025), on `{args.dataset_name}`.",
        f"```python\nfrom diffusers import {PIPELINE.__name__}\n\n{load}\n```",
    ]
    if picture is not None:
        picture = Path(picture).relative_to(args.output_dir)
        sections.append(f"Base model and tuned model at the same seeds:\n\n![base and tuned, side by side]({picture})")
    if args.validation_reward_model is not None:
        best = read_best(args)
        kept = f"checkpoint `{best['checkpoint']}`" if best["checkpoint"] else "the model here"
        sections.append(
            f"Best win rate over the base on the validation prompts, under `{args.validation_reward_model}`:"
            f" {best['win_rate']:.1%} at step {best['step']}, {kept}."
        )
    if metrics:
        table = "\n".join(f"| {name} | {value:.5g} |" for name, value in metrics.items())
        sections.append(f"## Last logged step\n\n| metric | value |\n|---|---|\n{table}")
    table = "\n".join(f"| `{name}` | `{value}` |" for name, value in recipe.items())
    sections.append(f"## Recipe\n\n| flag | value |\n|---|---|\n{table}")
    ModelCard("\n\n".join(sections) + "\n").save(Path(args.output_dir) / "README.md")


def save_final(unet, metrics, picture, args):
    """Writes the result to the output folder: a LoRA file, or a whole pipeline; and the model card."""
    if args.rank is not None:
        save_lora(unet, args.output_dir)
        if args.output_kohya_format:
            save_kohya_lora(unet, args.output_dir, args.lora_alpha)
    else:
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[args.save_precision]
        unet = unet.to(dtype)
        unet.save_pretrained(Path(args.output_dir) / "unet")  # first: the rest of the pipeline may fail to load
        vae = load_network("vae", AutoencoderKL, dtype, args)
        make_pipeline(unet, args, vae=vae, torch_dtype=dtype).save_pretrained(args.output_dir)
    save_model_card(args, metrics, picture)
    if args.push_to_hub:
        repo_id = create_repo(
            repo_id=args.hub_model_id or Path(args.output_dir).resolve().name, exist_ok=True, token=args.hub_token
        ).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "partial-checkpoint-*"],
            token=args.hub_token,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def check_engine(accelerator, args):
    """Refuses what the machine or the engine that accelerate was configured for cannot do, and configures the engine.

    Raises:
        ValueError: with the flag, and what to use instead.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU.")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}, but accelerate's configuration says"
            f" {accelerator.gradient_accumulation_steps}: make them equal, or take it out of the configuration."
        )
    engine = accelerator.distributed_type
    if engine not in SHARDING:
        return
    if args.rank is not None:
        raise ValueError(f"--rank: a LoRA is too small to be worth sharding: train it without {engine.value}.")
    if args.compile:
        raise ValueError(f"--compile: compiled blocks do not go together with {engine.value}: leave it out.")
    if args.optimizer == "adafactor" or args.use_8bit_adam:
        flag = "--optimizer adafactor" if args.optimizer == "adafactor" else "--use_8bit_adam"
        raise ValueError(f"{flag} cannot work on the shards of {engine.value}: use --optimizer adamw alone.")
    if engine == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("Only version 2 of FSDP is supported: set fsdp_version: 2 in accelerate's configuration.")
        if is_accelerate_version("<", "1.13.0"):
            raise ValueError(
                "FSDP needs accelerate 1.13.0 or later: earlier ones do not resume with the optimiser's state."
            )
        # Weights are exchanged in fp32: autocast rounds them, all but the norms', as it does in the reference.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        # With it transformers would load the text encoders, which are not sharded, in the first process alone.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    else:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage not in (1, 2):
            raise ValueError(
                "Stages 1 and 2 of ZeRO are supported: set zero_stage: 2, or use FSDP to shard weights too."
            )
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=args.train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=args.max_grad_norm,
        )


def start_accelerator(args):
    """The accelerator, the engine behind it configured, and what else belongs to the process: umask, logging, seed."""
    os.umask(os.umask(0o022) | 0o002)  # nothing that is written here is for everyone to change
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        step_scheduler_with_optimizer=False,  # it steps once an optimiser step, whatever the number of processes
    )
    check_engine(accelerator, args)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    if not accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_error()
        datasets.utils.logging.disable_progress_bar()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.dataloader_num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_gpu = accelerator.device.type != "cpu"
        args.dataloader_num_workers = min(MAX_WORKERS, max(1, cores // local_processes)) if on_gpu else 0
    torch.manual_seed(args.seed)  # the LoRA's first weights; all else is seeded pair by pair
    return accelerator


def set_up_unets(accelerator, models, weight_dtype, args):
    """Makes the UNet of `models` the policy, in the memory layout and with the options of the run; returns the reference, None
    for a LoRA."""
    unet, ref_unet = models["unet"], None
    if args.rank is None:
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        ref_unet = load_reference(args, accelerator.device, weight_dtype, round_norms=deepspeed)
    else:
        add_lora(unet, args)
    unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if weight_dtype != torch.float32 and accelerator.distributed_type not in SHARDING:
        for network in filter(None, (unet, ref_unet, models["vae"])):
            network.to(memory_format=torch.channels_last)  # in which convolutions in half precision are fastest
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64  # widths, with and without gradient, policy and reference: over 8
        torch._inductor.config.emulate_precision_casts = True  # or policy and reference would round differently
        for network in filter(None, (unet, ref_unet)):
            network.compile_repeated_blocks()
    return ref_unet


def main(args):
    accelerator = start_accelerator(args)

    # Configurations and data before weights: a wrong model or column is found in seconds.
    check_models(args)
    alpha_bar = load_noise_schedule(args).to(accelerator.device)
    (pairs, rows, soft_labels_0), held_out = load_pairs(accelerator, args)
    pairs_per_micro_step = args.train_batch_size * accelerator.num_processes
    pairs_per_step = pairs_per_micro_step * args.gradient_accumulation_steps
    record = record_of_run(accelerator, rows, soft_labels_0, args)
    if args.resume_from_checkpoint is not None:
        require_same_run(record, args)

    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    reward = load_validation_reward(weight_dtype, args) if args.validation_reward_model is not None else None
    models = load_models(args, accelerator.device, weight_dtype)
    unet = models["unet"]
    models["ref_unet"] = set_up_unets(accelerator, models, weight_dtype, args)

    learning_rate = args.learning_rate * (pairs_per_step if args.scale_lr else 1)
    optimizer = make_optimizer([p for p in unet.parameters() if p.requires_grad], learning_rate, args)
    steps_per_epoch = math.ceil(len(rows) // pairs_per_micro_step / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    num_parameters = sum(p.numel() for p in unet.parameters() if p.requires_grad)

    def autocast():  # accelerator.autocast() does nothing under DeepSpeed
        return torch.autocast(accelerator.device.type, weight_dtype, enabled=weight_dtype != torch.float32)

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unet.forward = autocast()(unet.forward)  # the engine switches an autocast around it off
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    parameters = [p for p in unet.parameters() if p.requires_grad]  # only now: FSDP replaces them
    models["unet"] = unet

    register_checkpoint_hooks(accelerator, args)
    global_step = 0
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)
        follow_layout(optimizer.optimizer)
        accelerator.step = 0  # checkpoints lie on optimiser steps, whatever the accumulation was or is
        global_step = step_of(args.resume_from_checkpoint)
    dataset = PairDataset(pairs, rows, soft_labels_0, len(alpha_bar), args)
    dataloader, batches_per_epoch = make_dataloader(accelerator, dataset, global_step, args)
    if accelerator.is_main_process:
        start_output(record, args)
        flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in record["args"].items()}
        accelerator.init_trackers(args.tracker_project_name, config=flat)

    logger.info(f"Pairs: {len(rows)}; pairs per optimiser step: {pairs_per_step}")
    logger.info(f"Trained parameters: {num_parameters:,}; learning rate: {learning_rate:.4g}")
    logger.info(f"Optimiser steps: {max_train_steps}, from step {global_step}")

    def calls_behind(num_calls):
        most = torch.tensor(num_calls, device=accelerator.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most) - num_calls

    in_lockstep = calls_behind if accelerator.distributed_type == DistributedType.FSDP else None
    step_context = (models, alpha_bar, autocast, args, in_lockstep)
    if held_out is not None:
        held_out = PairDataset(*held_out, len(alpha_bar), args)
    validation = Validation(accelerator, held_out, reward, step_context)

    bar = tqdm(
        total=max_train_steps,
        initial=global_step,
        desc="Steps",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    logs, sums, problems, nonfinite_steps, nonfinite_in_a_row = {}, None, [], 0, 0
    first_step, step_started = global_step, time.perf_counter()
    stop_signals = listen_for_stop()
    batches = iter(dataloader)
    # After an error Python would wait for the workers, which do not hear its SIGTERM.
    atexit.register(lambda: [worker.kill() for worker in multiprocessing.active_children()])
    while global_step < max_train_steps:
        batch = next(batches)
        for problem in batch["problems"][: max(0, MIN_BAD_PAIRS - len(problems))]:
            logger.warning(f"A pair cannot be read, the next one takes its place: {problem}", main_process_only=False)
        problems += batch["problems"]
        for micro_batch in prepare_micro_batches(batch, *step_context):
            with accelerator.accumulate(unet):
                loss, metrics = training_step(micro_batch, unet, alpha_bar, autocast, args)
                accelerator.backward(loss)
                values = torch.stack(list(metrics.values()))
                sums = values if sums is None else sums + values
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
                    # Whatever the processes have to agree on, in one exchange a step.
                    counts = torch.tensor([len(problems), bool(stop_signals)], device=sums.device)
                    means = accelerator.reduce(
                        torch.cat([sums / args.gradient_accumulation_steps, counts]), "mean"
                    ).tolist()
                    *means, num_problems, stopping = means
                    logs = dict(zip(metrics, means))
                    finite = math.isfinite(logs["loss"]) and math.isfinite(grad_norm)
                    if finite or accelerator.scaler is not None:  # fp16's scaler skips the step itself
                        optimizer.step()
                    optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        global_step += 1
        lr = optimizer.param_groups[0]["lr"]
        if finite and not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            nonfinite_in_a_row = 0
        else:
            nonfinite_steps += 1
            nonfinite_in_a_row += 1
        total_weight = sum(logs[f"weight/{name}"] for name in WEIGHT_BINS)
        for name in WEIGHT_BINS:
            logs[f"weight_share/{name}"] = logs.pop(f"weight/{name}") / total_weight
        now = time.perf_counter()
        logs["lr"], logs["grad_norm"] = lr, grad_norm
        logs["pairs_per_second"] = pairs_per_step / (now - step_started)
        logs["epoch"] = global_step * args.gradient_accumulation_steps / batches_per_epoch
        logs["skipped_pairs"] = round(num_problems * accelerator.num_processes)
        logs["nonfinite_steps"] = nonfinite_steps
        if accelerator.device.type == "cuda":
            logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        accelerator.log(logs, step=global_step)
        bar.update(1)
        bar.set_postfix(
            loss=f"{logs['loss']:.4f}",
            acc=f"{logs['implicit_accuracy']:.2f}",
            lr=f"{lr:.2e}",
            pairs_s=f"{logs['pairs_per_second']:.1f}",
        )
        sums = None
        drawn = (global_step - first_step) * pairs_per_step + logs["skipped_pairs"]
        too_many_bad = logs["skipped_pairs"] > max(MIN_BAD_PAIRS, args.max_bad_fraction * drawn)
        # DeepSpeed has taken its step in the backward pass, whatever the numbers were; the others have not.
        sound = finite or accelerator.distributed_type != DistributedType.DEEPSPEED
        if sound and (stopping or too_many_bad or global_step % args.checkpointing_steps == 0):
            save_checkpoint(accelerator, global_step, record, args)
        if too_many_bad or nonfinite_in_a_row == args.max_nonfinite_steps:
            raise stopped_by(too_many_bad, drawn, problems, logs, global_step, args)
        if stopping and sound and global_step < max_train_steps:
            logger.warning(
                f"Stopped by a signal at step {global_step}: --resume_from_checkpoint latest goes on from there."
            )
            accelerator.end_training()
            sys.exit(EXIT_STOPPED)
        if global_step % args.validation_steps == 0:
            logs.update(validation.run(global_step))
        step_started = time.perf_counter()

    bar.close()
    if validation.step != global_step:
        logs.update(validation.run(global_step))
    policy = plain_unet(accelerator, unet)
    if accelerator.is_main_process:
        save_final(policy, logs, validation.picture, args)
    accelerator.end_training()


def versions():
    """Versions of everything that the result depends on."""
    packages = (torch, diffusers, transformers, accelerate, datasets, peft)
    return {"python": platform.python_version(), **{package.__name__: package.__version__ for package in packages}}


if __name__ == "__main__":
    main(parse_args())
