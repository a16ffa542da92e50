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
#     "matplotlib",
# ]
# ///
"""Says whether a tuned model wins: medians and win rates of base against tuned, under one or several reward models.

    accelerate launch evaluate_smpo.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --models smpo=smpo-sd15 --prompts_path prompts.txt --output_dir evaluation

Every model draws every prompt with the same seeds, and every image gets its rewards: 100 times the cosine of PickScore
or of other CLIP-style models, and what else is asked for. A model's win rate over another is the share of images with the
higher reward than the other's at the same prompt and seed, a tie counting a half; its 95 % interval is a bootstrap over
prompts. With several files of prompts, or a --group_column, all of it is also said of each group.

The output folder gets

    images/NAME/PROMPT_IMAGE.png   the images
    scores.csv                     one line an image
    results.csv, results.json      medians, means and win rates, of every model over every other
    results.md                     the same to read
    comparison-NAME.png            base beside tuned, for prompts from the largest gain to the largest loss
    gaps.png                       how tuned less base is distributed
    checkpoints.png                win rate over training steps, with --run_dir

The same command, started again, draws only the images that are not there yet. With `accelerate launch` several processes
share the drawing; machines have to share the folder.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import textwrap
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import parse_flag_from_env
from datasets import load_dataset, load_from_disk
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import check_min_version


check_min_version("0.35.0")

logger = get_logger(__name__)

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore was tuned from this CLIP
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"  # whose embeddings LAION's aesthetic head takes
# The numbers of the linear layers in the linearMSE predictors, dropout between; others have ReLUs there and other numbers.
AESTHETIC_LAYERS = [0, 2, 4, 6, 7]
IMAGE_REWARD = "ImageReward-v1.0"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
NUM_BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_CHUNK = 500  # of them at a time
NUM_COMPARED_PROMPTS = 12
PROMPT_FILES = [".txt", ".json", ".csv", ".tsv", ".parquet"]
EVALUATION_RECORD = "evaluation_args.json"
MERGE_TIMEOUT = timedelta(days=7)  # how long a process waits at the end for a slower one
ALL = "all"  # the group of all prompts


# ---------------------------------------------------------------------------------------------------------------------
# The statistics
# ---------------------------------------------------------------------------------------------------------------------


def wins(scores, base_scores):
    """1 where a score is higher than the base's, 0 where it is lower, 0.5 at a tie; arrays of any one shape.

    >>> wins(np.array([3.0, 1.0, 2.0]), np.array([2.0, 2.0, 2.0]))
    array([1. , 0. , 0.5])
    """
    return (scores > base_scores) + 0.5 * (scores == base_scores)


def bootstrap_interval(values, seed):
    """95 % interval of the mean of `values` `[prompts, images]` when the prompts are drawn anew: (low, high).

    A percentile bootstrap with `NUM_BOOTSTRAP_SAMPLES` draws; the images of a prompt stay together, as they are not
    independent.

    >>> won = np.repeat([[1.0, 1.0], [0.0, 0.0]], 50, axis=0)  # every image of 50 of 100 prompts
    >>> bootstrap_interval(won, seed=0)
    (0.4, 0.6)
    """
    prompt_means = np.asarray(values, dtype=np.float64).mean(axis=1)
    rng, count = np.random.default_rng(seed), len(prompt_means)
    means = [
        prompt_means[rng.integers(count, size=(BOOTSTRAP_CHUNK, count))].mean(axis=1)
        for _ in range(NUM_BOOTSTRAP_SAMPLES // BOOTSTRAP_CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def summarise(scores, groups, seed):
    """Medians and means of every model, and its win rates over every other one.

    Args:
        scores: `{reward: {model: float array [prompts, images]}}`, the base first.
        groups: the group of each prompt, or None for each.
        seed: of the bootstrap.

    Returns:
        Dicts with `reward`, `group`, `model`, `median`, `mean` and `num_prompts`, and dicts with `reward`, `group`, `model`,
        `opponent`, `win_rate`, `win_rate_low`, `win_rate_high` and `tie_rate`. Groups are `ALL` and, if there are several,
        each.

    >>> base, tuned = np.array([[20.0], [21.0], [22.0]]), np.array([[21.0], [23.0], [22.0]])
    >>> results, duels = summarise({"pick": {"base": base, "tuned": tuned}}, [None] * 3, seed=0)
    >>> find(results, model="tuned")["median"]
    22.0
    >>> print("{:.3f} {:.3f}".format(*(find(duels, model="tuned")[key] for key in ("win_rate", "tie_rate"))))
    0.833 0.333
    """
    chosen = {ALL: np.ones(len(groups), dtype=bool)}
    for group in dict.fromkeys(group for group in groups if group is not None):
        chosen[group] = np.array([other == group for other in groups])
    results, duels = [], []
    for reward, of_model in scores.items():
        for group, prompts in chosen.items():
            if len(chosen) == 2 and group != ALL:
                continue  # a single group is all
            key = {"reward": reward, "group": group}
            for model, values in of_model.items():
                values = values[prompts]
                numbers = {"median": float(np.median(values)), "mean": float(np.mean(values))}
                results.append({**key, "model": model, **numbers, "num_prompts": len(values)})
                for opponent, others in of_model.items():
                    if opponent != model:
                        won = wins(values, others[prompts])
                        low, high = bootstrap_interval(won, seed)
                        duel = {"win_rate": float(won.mean()), "win_rate_low": low, "win_rate_high": high}
                        ties = float((values == others[prompts]).mean())
                        duels.append({**key, "model": model, "opponent": opponent, **duel, "tie_rate": ties})
    return results, duels


def find(rows, **values):
    """The row, of `summarise`, that has these values.

    >>> find([{"model": "base", "mean": 1.0}, {"model": "tuned", "mean": 2.0}], model="tuned")
    {'model': 'tuned', 'mean': 2.0}
    """
    (row,) = [row for row in rows if values.items() <= row.items()]
    return row


def in_percent(duel):
    """Win rate and interval of a row of `summarise`, as texts.

    >>> in_percent({"win_rate": 0.695, "win_rate_low": 0.633, "win_rate_high": 0.754})
    ('69.5%', '63.3% to 75.4%')
    """
    return f"{duel['win_rate']:.1%}", f"{duel['win_rate_low']:.1%} to {duel['win_rate_high']:.1%}"


def as_markdown(results, duels):
    """What `summarise` returns as Markdown: a table for each reward and group, and all against all where models are many.

    >>> scores = {"pick": {"base": np.array([[20.0], [21.0]]), "tuned": np.array([[21.0], [23.0]])}}
    >>> print(as_markdown(*summarise(scores, [None] * 2, seed=0)))
    **pick**, all prompts (2)
    <BLANKLINE>
    | model | median score | mean score | win rate over base | 95 % interval | ties |
    |---|---|---|---|---|---|
    | base | 20.500 | 20.500 |  |  |  |
    | tuned | 22.000 | 22.000 | 100.0% | 100.0% to 100.0% | 0.0% |
    """
    lines = []
    models = list(dict.fromkeys(row["model"] for row in results))
    base = models[0]
    for reward, group in dict.fromkeys((row["reward"], row["group"]) for row in results):
        key = {"reward": reward, "group": group}
        count = find(results, model=base, **key)["num_prompts"]
        lines += [f"**{reward}**, {group} prompts ({count})", ""]
        lines += ["| model | median score | mean score | win rate over base | 95 % interval | ties |"]
        lines += ["|---|---|---|---|---|---|"]
        for model in models:
            row = find(results, model=model, **key)
            cells = ["", "", ""]
            if model != base:
                duel = find(duels, model=model, opponent=base, **key)
                cells = [*in_percent(duel), f"{duel['tie_rate']:.1%}"]
            lines.append(f"| {model} | {row['median']:.3f} | {row['mean']:.3f} | {' | '.join(cells)} |")
        lines.append("")
        if len(models) > 2 and group == ALL:
            lines += [f"| {reward}, win rate over | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
            for model in models:
                others = [
                    None if other == model else find(duels, model=model, opponent=other, **key) for other in models
                ]
                cells = ["" if duel is None else "{} ({})".format(*in_percent(duel)) for duel in others]
                lines.append(f"| {model} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines).rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Medians and win rates, base against tuned.")

    group = parser.add_argument_group("models", "Give --models, --run_dir, or both.")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Base model: a Hub name or a folder.")
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help='Variant of the base model\'s weight files, for example "fp16".')
    group.add_argument(
        "--models",
        nargs="+",
        default=[],
        help="Tuned models, each PATH or NAME=PATH: a pipeline (folder or Hub name), a UNet folder, a training checkpoint,"
        " or a LoRA file or folder, the last three on top of the base model.",
    )
    group.add_argument(
        "--run_dir",
        help="Output folder of a training run: each of its checkpoints is a model, and win rates are plotted.",
    )
    group.add_argument("--cache_dir", help="Where downloaded models and data are kept.")

    group = parser.add_argument_group("prompts", "Give one of --prompts_path and --dataset_name.")
    group.add_argument(
        "--prompts_path",
        nargs="+",
        help="Files of prompts, each a group if there are several: txt with a prompt a line, json with a list of prompts (as"
        " HPDv2's), or csv, tsv (as Parti-Prompts), json or Parquet with --caption_column.",
    )
    group.add_argument(
        "--dataset_name",
        help="Data set: a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", "--split", default="train", help="Split of the data set.")
    group.add_argument("--caption_column", default="caption", help="Prompt of the images.")
    group.add_argument(
        "--group_column", help="What the results are broken down by, for example Category of Parti-Prompts."
    )
    group.add_argument("--max_prompts", type=int, help="Use the first so many prompts.")

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num_images_per_prompt", type=int, default=1, help="Images per prompt, each with its own seed."
    )
    group.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="Classifier-free guidance.")
    group.add_argument("--resolution", type=int, default=512, help="Side of the square images, in pixels.")
    group.add_argument("--seed", type=int, default=0, help="Seed of the first image; each further one has the next.")

    group = parser.add_argument_group("reward model")
    group.add_argument(
        "--reward_model",
        nargs="+",
        default=[PICKSCORE],
        help="CLIP-style models that score, each PATH or NAME=PATH: Hub names or folders.",
    )
    group.add_argument("--reward_model_revision", nargs="+", help="Revision of each reward model on the Hub.")
    group.add_argument(
        "--reward_processor",
        nargs="+",
        help=f"Processor of each reward model. Default: the model's own; for PickScore {PICKSCORE_PROCESSOR}.",
    )
    group.add_argument(
        "--aesthetic_head",
        help="Weights of LAION's aesthetic predictor (sac+logos+ava1-l14-linearMSE.pth), a reward of its own.",
    )
    group.add_argument(
        "--aesthetic_clip", default=AESTHETIC_CLIP, help="CLIP whose image embeddings --aesthetic_head takes."
    )
    group.add_argument(
        "--image_reward", action="store_true", help=f"Also score with {IMAGE_REWARD}: pip install image-reward."
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Precision of the models. Default: float16 on an accelerator, float32 on a CPU.",
    )
    group.add_argument("--batch_size", type=int, default=16, help="Images at a time.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="Folder for images, scores and tables.")

    args = parser.parse_args(input_args)
    validate_args(args)
    return args


def named_sources(values, flag, taken, problems):
    """`{name: path}` of a flag's values, PATH or NAME=PATH; what is wrong with them is added to the problems."""
    sources = {}
    for value in values:
        name, _, path = value.rpartition("=")
        name = name or Path(path).name.removesuffix(".safetensors")
        if not re.fullmatch(r"[\w.-]+", name) or name in taken or name in sources:
            problems.append(
                f"--{flag} {value}: {name!r} cannot name it, as it is taken or has other characters than letters, digits, '.',"
                " '_' and '-'. Give NAME=PATH."
            )
        sources[name] = path
    return sources


def validate_args(args):
    """Checks the flags, and fills in what depends on others.

    --models, with the checkpoints of --run_dir, and --reward_model become `{name: path}`; `args.steps` is `{checkpoint: step}`.

    Raises:
        ValueError: with every problem that the flags alone show, one a line, before anything is loaded.
    """
    problems = []
    for name in ("max_prompts", "num_images_per_prompt", "num_inference_steps", "resolution", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            problems.append(f"--{name} must be positive, got {getattr(args, name)}.")
    if args.resolution % 8:
        problems.append(f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}.")
    if not math.isfinite(args.guidance_scale):
        problems.append(f"--guidance_scale must be finite, got {args.guidance_scale}.")
    if args.seed < 0:
        problems.append(f"--seed must not be negative, got {args.seed}.")
    if (args.prompts_path is None) == (args.dataset_name is None):
        problems.append("Give prompts with one of --prompts_path and --dataset_name.")
    for path in args.prompts_path or []:
        if not Path(path).is_file():
            problems.append(f"--prompts_path {path} is not a file.")
        elif Path(path).suffix not in PROMPT_FILES:
            problems.append(f"--prompts_path {path} must end in {', '.join(PROMPT_FILES)}.")
    args.models = named_sources(args.models, "models", ["base"], problems)
    for model, path in args.models.items():
        if model_kind(path) is None:
            problems.append(
                f"--models {model}={path} is neither a Hub name nor a pipeline, a UNet folder, a training checkpoint or a LoRA"
                " file."
            )
    args.steps = {}
    if args.run_dir is not None:
        for folder in Path(args.run_dir).glob("checkpoint-*"):
            if folder.name.removeprefix("checkpoint-").isdigit() and model_kind(str(folder)) is not None:
                args.steps[folder.name] = int(folder.name.removeprefix("checkpoint-"))
        args.steps = dict(sorted(args.steps.items(), key=lambda item: item[1]))
        if not args.steps:
            problems.append(f"--run_dir {args.run_dir} has no folders named checkpoint-STEP with a model.")
        for name in args.steps.keys() & args.models.keys():
            problems.append(f"--models {name} has the name of a checkpoint of --run_dir: give it another.")
        args.models.update({name: str(Path(args.run_dir) / name) for name in args.steps})
    elif not args.models:
        problems.append("Give tuned models with --models, or the folder of a run with --run_dir.")
    taken = ["aesthetic"] * (args.aesthetic_head is not None) + ["imagereward"] * args.image_reward
    args.reward_model = named_sources(args.reward_model, "reward_model", taken, problems)
    for name in ("reward_model_revision", "reward_processor"):
        values = getattr(args, name)
        if values is not None and len(values) != len(args.reward_model):
            problems.append(
                f"--{name} has {len(values)} values for {len(args.reward_model)} reward models: give one for each."
            )
    if args.aesthetic_head is not None and not Path(args.aesthetic_head).is_file():
        problems.append(f"--aesthetic_head {args.aesthetic_head} is not a file.")
    if args.aesthetic_head is None and args.aesthetic_clip != AESTHETIC_CLIP:
        problems.append("--aesthetic_clip does nothing without --aesthetic_head.")
    if args.image_reward and importlib.util.find_spec("ImageReward") is None:
        problems.append("--image_reward needs its package: pip install image-reward.")
    if problems:
        raise ValueError("\n".join(problems))

    if args.reward_processor is None:
        paths = args.reward_model.values()
        args.reward_processor = [PICKSCORE_PROCESSOR if path == PICKSCORE else path for path in paths]
    if args.reward_model_revision is None:
        args.reward_model_revision = [None] * len(args.reward_model)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
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


def read_prompts(path, args):
    """(prompt, group) of a file of --prompts_path; the group is None without a --group_column.

    Raises:
        ValueError: the file cannot be read, or has no such columns.
    """
    path = Path(path)
    accepted = "txt with a prompt a line, a json list of prompts, or csv, tsv, json or Parquet with --caption_column"
    with loading("prompts_path", path, accepted):
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        elif path.suffix in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        else:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" else text.splitlines()
        if not isinstance(rows, list) or {type(row) for row in rows} not in ({str}, {dict}, set()):
            raise ValueError("it holds no list of prompts or of rows")
    if not rows or not isinstance(rows[0], dict):
        if args.group_column is not None:
            raise ValueError(f"--group_column {args.group_column} is one of a table: {path} is a list of prompts.")
        return [(row.strip(), None) for row in rows]
    # Parti-Prompts writes Prompt
    columns = {name.lower(): name for name in [*rows[0]][::-1]}
    caption = next((columns[name] for name in (args.caption_column.lower(), "prompt") if name in columns), None)
    group = args.group_column and columns.get(args.group_column.lower())
    named = {"caption_column": (args.caption_column, caption), "group_column": (args.group_column, group)}
    require_columns(list(rows[0]), {flag: name for flag, (name, found) in named.items() if name and not found})
    return [(row[caption], group and str(row[group])) for row in rows]


def load_prompts(args):
    """The different prompts, in the order in which they first occur, and the group of each, or None.

    Raises:
        ValueError: there is none, or they cannot be read.
    """
    found = []
    if args.prompts_path is None:
        data = load_data(args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir)
        columns = {"caption_column": args.caption_column}
        if args.group_column is not None:
            columns["group_column"] = args.group_column
        require_columns(data.column_names, columns)
        rows = data.select_columns([*dict.fromkeys(columns.values())])[:]
        groups = rows.get(args.group_column, [None] * len(data))
        found = [
            (prompt, group if group is None else str(group))
            for prompt, group in zip(rows[args.caption_column], groups)
        ]
    for path in args.prompts_path or []:
        of_file = read_prompts(path, args)
        if len(args.prompts_path) > 1 and args.group_column is None:
            of_file = [(prompt, Path(path).stem) for prompt, _ in of_file]
        found += of_file
    group_of = {}
    for prompt, group in found:
        if prompt:
            group_of.setdefault(prompt, group)
    if not group_of:
        raise ValueError(f"{args.prompts_path or args.dataset_name} has no prompts.")
    prompts = list(group_of)[: args.max_prompts]
    return prompts, [group_of[prompt] for prompt in prompts]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def model_kind(path):
    """What a path of --models holds: "pipeline", "unet" or "lora"; None if it is neither that nor a Hub name."""
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".safetensors" or (folder / LORA_FILE).is_file():
        return "lora"
    if (folder / "model_index.json").is_file() or (not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
        return "pipeline"
    if (folder / "config.json").is_file() or (folder / "unet" / "config.json").is_file():
        return "unet"
    return None


def load_pipeline(path, device, args):
    """The pipeline of a tuned model, see --models; the base model's for path None.

    Raises:
        ValueError: it cannot be loaded.
    """
    options = {"torch_dtype": getattr(torch, args.dtype), "cache_dir": args.cache_dir}
    kind = path and model_kind(path)
    if kind == "pipeline":
        with loading("models", path):
            pipeline = DiffusionPipeline.from_pretrained(path, safety_checker=None, **options)
    else:
        name = args.pretrained_model_name_or_path
        with loading("pretrained_model_name_or_path", name):
            pipeline = DiffusionPipeline.from_pretrained(
                name, revision=args.revision, variant=args.variant, safety_checker=None, **options
            )
    with loading("models", path):
        if kind == "lora":
            folder, name = (path, LORA_FILE) if Path(path).is_dir() else (Path(path).parent, Path(path).name)
            pipeline.load_lora_weights(folder, weight_name=name)  # older diffusers do not look for it offline
        elif kind == "unet":
            subfolder = None if (Path(path) / "config.json").is_file() else "unet"
            pipeline.unet = UNet2DConditionModel.from_pretrained(path, subfolder=subfolder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def fingerprint(path):
    """Tells a local model from what it was before: a hash of its files' names, sizes and times. A Hub name is itself."""
    if path is None or not Path(path).exists():
        return path
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.safetensors"))
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return f"{path} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def open_output(prompts, args):
    """Makes the output folder, or finds that the images in it are of these prompts, settings and models.

    Raises:
        ValueError: they are of others; it says which.
    """
    folder = Path(args.output_dir)
    names = ["num_images_per_prompt", "num_inference_steps", "guidance_scale", "resolution", "seed", "dtype"]
    record = {f"--{name}": getattr(args, name) for name in names}
    record["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    record["model base"] = [fingerprint(args.pretrained_model_name_or_path), args.revision, args.variant]
    record.update({f"model {name}": fingerprint(path) for name, path in args.models.items()})
    path = folder / EVALUATION_RECORD
    saved = json.loads(path.read_text()) if path.is_file() else {}
    changes = [
        f"{key}: {saved[key]} then, {value} now" for key, value in record.items() if saved.get(key, value) != value
    ]
    if changes:
        listed = "\n".join(changes)
        raise ValueError(
            f"--output_dir {folder} holds images of something else:\n{listed}\nGive another folder, or delete this one."
        )
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**saved, **record}, indent=2))
    PartialState().wait_for_everyone()


def image_path(name, prompt, i, args):
    return Path(args.output_dir) / "images" / name / f"{prompt:05d}_{i}.png"


def draw_images(name, path, prompts, args):
    """Draws every prompt with every seed and saves each image, this process's share of those that are not there yet."""
    state = PartialState()
    jobs = [(prompt, i) for prompt in range(len(prompts)) for i in range(args.num_images_per_prompt)]
    share = [len(jobs) * part // state.num_processes for part in (state.process_index, state.process_index + 1)]
    missing = [job for job in jobs[slice(*share)] if not image_path(name, *job, args).exists()]
    if not missing:
        return
    pipeline = load_pipeline(path, state.device, args)
    image_path(name, 0, 0, args).parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(missing), desc=f"Images of {name}", unit="image", disable=not state.is_local_main_process)
    for start in range(0, len(missing), args.batch_size):
        batch = missing[start : start + args.batch_size]
        seeds = [args.seed + prompt * args.num_images_per_prompt + i for prompt, i in batch]
        images = pipeline(
            [prompts[prompt] for prompt, _ in batch],
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            # On the CPU, so that an image does not depend on the device or on the batch it is drawn in.
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        for job, image in zip(batch, images):
            target = image_path(name, *job, args)
            temporary = target.with_name(f".{target.name}.tmp")  # a killed run leaves no half of an image
            image.save(temporary, "png")
            os.replace(temporary, target)
        bar.update(len(batch))
    bar.close()


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


def compare(name, gaps, prompts, args):
    """`side_by_side` of at most `NUM_COMPARED_PROMPTS` prompts, evenly spaced from the largest gain to the largest loss.

    `gaps` is a model's score less the base's, averaged over images, `[prompts]`.
    """
    order = np.argsort(-gaps, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(NUM_COMPARED_PROMPTS, len(order))).round().astype(int)]
    images = [
        [
            [Image.open(image_path(model, prompt, i, args)) for i in range(args.num_images_per_prompt)]
            for prompt in chosen
        ]
        for model in ("base", name)
    ]
    return side_by_side(*images, [f"{prompts[prompt]} ({gaps[prompt]:+.2f})" for prompt in chosen])


def draw_gaps(scores):
    """Histograms of score less the base's, a panel a reward, a line a model."""
    figure = Figure(figsize=(6 * len(scores), 4), layout="constrained")
    for axes, (reward, of_model) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        base, *others = of_model
        gaps = {model: (of_model[model] - of_model[base]).ravel() for model in others}
        ends = np.quantile(np.concatenate(list(gaps.values())), [0.001, 0.999])
        bins = np.linspace(min(ends[0], -1e-6), max(ends[1], 1e-6), 61)
        for model, values in gaps.items():
            axes.hist(np.clip(values, bins[0], bins[-1]), bins=bins, histtype="step", label=model)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set(title=reward, xlabel="score less the base's", ylabel="images")
        axes.legend()
    return figure


def draw_checkpoints(duels, steps):
    """Win rate over the base by training step, with its interval, a line a reward."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for reward in dict.fromkeys(duel["reward"] for duel in duels):
        rows = [find(duels, reward=reward, group=ALL, model=model, opponent="base") for model in steps]
        axes.plot(steps.values(), [row["win_rate"] for row in rows], marker="o", label=reward)
        low, high = ([row[f"win_rate_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(steps.values(), low, high, alpha=0.2)
    axes.axhline(0.5, color="black", linewidth=0.5)
    axes.set(xlabel="training step", ylabel="win rate over base, 95 % interval", ylim=(0, 1))
    axes.legend()
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------------


class Reward(NamedTuple):
    """A reward model, frozen and on its device, with its processor; `pixels` says which of the distinct image processors
    prepares its images."""

    name: str
    model: torch.nn.Module
    processor: transformers.ProcessorMixin
    pixels: int


def load_rewards(device, dtype, args):
    """The reward models, and their distinct image processors.

    Raises:
        ValueError: a part cannot be loaded, or a model does not embed images and texts into one space.
    """
    rewards, image_processors = [], []
    sources = zip(args.reward_model.items(), args.reward_model_revision, args.reward_processor)
    for (name, path), revision, processor_path in sources:
        with loading("reward_model", path):
            model = AutoModel.from_pretrained(path, revision=revision, cache_dir=args.cache_dir)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ValueError(f"--reward_model {path} is a {type(model).__name__}, not a CLIP-style model.")
        with loading("reward_processor", processor_path):
            processor = AutoProcessor.from_pretrained(processor_path, cache_dir=args.cache_dir)
        settings = [image_processor.to_dict() for image_processor in image_processors]
        if processor.image_processor.to_dict() not in settings:
            image_processors.append(processor.image_processor)
            settings.append(processor.image_processor.to_dict())
        pixels = settings.index(processor.image_processor.to_dict())
        rewards.append(Reward(name, model.requires_grad_(False).eval().to(device, dtype), processor, pixels))
    return rewards, image_processors


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


def load_aesthetic_head(path):
    """LAION's aesthetic predictor: linear layers one after the other, from an image embedding to a number.

    https://github.com/christophschuhmann/improved-aesthetic-predictor. The dropout between them does nothing here.

    Raises:
        ValueError: the file holds no such layers.
    """
    numbers = ", ".join(map(str, AESTHETIC_LAYERS))
    with loading("aesthetic_head", path, f"weights and biases of layers.N, N of {numbers}: the linearMSE predictors"):
        try:
            weights = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # safetensors and pickle have errors of their own
            raise ValueError(f"it is no file of tensors ({type(error).__name__})") from error
        names = {f"layers.{number}.{part}" for number in AESTHETIC_LAYERS for part in ("weight", "bias")}
        if set(weights) != names:
            raise ValueError(f"it holds {', '.join(list(weights)[:12])}")
        layers = []
        for number in AESTHETIC_LAYERS:
            weight, bias = (weights[f"layers.{number}.{part}"] for part in ("weight", "bias"))
            layer = torch.nn.Linear(*reversed(weight.shape))
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
    return torch.nn.Sequential(*layers).requires_grad_(False)


def load_scorers(device, args):
    """What scores: `{reward: function of N images and N prompts, to N numbers}`.

    CLIP-style rewards are 100 times the cosine; the others are what their models say.

    Raises:
        ValueError: a model cannot be loaded.
    """
    dtype = getattr(torch, args.dtype)

    def cosines(reward, images, texts):
        pixels = reward.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        products = embed_images(reward.model, pixels) * embed_texts(reward.model, reward.processor, texts)
        return 100 * products.sum(-1).cpu()

    scorers = {reward.name: functools.partial(cosines, reward) for reward in load_rewards(device, dtype, args)[0]}
    if args.aesthetic_head is not None:
        head = load_aesthetic_head(args.aesthetic_head).to(device)
        with loading("aesthetic_clip", args.aesthetic_clip):
            clip = AutoModel.from_pretrained(args.aesthetic_clip, cache_dir=args.cache_dir).eval().to(device, dtype)
            processor = AutoProcessor.from_pretrained(args.aesthetic_clip, cache_dir=args.cache_dir).image_processor

        def aesthetic(images, texts):
            return head(embed_images(clip, processor(images=images, return_tensors="pt")["pixel_values"]))[:, 0].cpu()

        scorers["aesthetic"] = aesthetic
    if args.image_reward:
        import ImageReward

        model = ImageReward.load(IMAGE_REWARD, device=str(device), download_root=args.cache_dir)
        scorers["imagereward"] = lambda images, texts: [model.score(text, image) for text, image in zip(texts, images)]
    return scorers


def score_files(paths, prompts, scorers, batch_size):
    """Rewards of N image files for their prompts: `{reward: float64 array [N]}`."""
    scores = {name: [] for name in scorers}
    for start in tqdm(range(0, len(paths), batch_size), desc="Scores", unit="batch"):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
        for name, scorer in scorers.items():
            scores[name].append(np.asarray(scorer(images, prompts[start : start + batch_size]), dtype=np.float64))
    return {name: np.concatenate(values) for name, values in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def write_csv(path, rows):
    """A table of dicts, with the columns of them all."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=MERGE_TIMEOUT)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    args.dtype = args.dtype or ("float32" if state.device.type == "cpu" else "float16")
    prompts, groups = load_prompts(args)
    models = {"base": None, **args.models}
    open_output(prompts, args)
    scorers = load_scorers(state.device, args) if state.is_main_process else None  # first: they may not be there
    for name, path in models.items():
        draw_images(name, path, prompts, args)
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    shape = (len(prompts), args.num_images_per_prompt)
    jobs = [(name, prompt, i) for name in models for prompt, i in np.ndindex(*shape)]
    paths = [image_path(*job, args) for job in jobs]
    flat = score_files(paths, [prompts[prompt] for _, prompt, _ in jobs], scorers, args.batch_size)
    scores = {reward: dict(zip(models, values.reshape(len(models), *shape))) for reward, values in flat.items()}

    output_dir = Path(args.output_dir)
    seeds = [args.seed + prompt * args.num_images_per_prompt + i for _, prompt, i in jobs]
    rows = [
        {"model": name, "prompt": prompts[prompt], "group": groups[prompt], "seed": seed}
        | {reward: values[row] for reward, values in flat.items()}
        | {"image": path.relative_to(output_dir)}
        for row, ((name, prompt, _), seed, path) in enumerate(zip(jobs, seeds, paths))
    ]
    write_csv(output_dir / "scores.csv", rows)
    results, duels = summarise(scores, groups, args.seed)
    write_csv(output_dir / "results.csv", results + duels)
    record = {"results": results, "win_rates": duels, "args": vars(args)}
    (output_dir / "results.json").write_text(json.dumps(record, indent=2))
    (output_dir / "results.md").write_text(as_markdown(results, duels) + "\n")
    first_reward = next(iter(scores.values()))
    for name in args.models:
        gaps = (first_reward[name] - first_reward["base"]).mean(axis=1)
        compare(name, gaps, prompts, args).save(output_dir / f"comparison-{name}.png")
    draw_gaps(scores).savefig(output_dir / "gaps.png", dpi=120)
    if args.steps:
        draw_checkpoints(duels, args.steps).savefig(output_dir / "checkpoints.png", dpi=120)
    print(as_markdown(results, duels))
    print(f"\nImages, scores and pictures are in {output_dir}.")


if __name__ == "__main__":
    main(parse_args())
