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
#     "peft>=0.17.0",
#     "datasets>=3.6.0",  # brings pandas
#     "pyarrow>=17.0",
#     "pillow>=10.1",
# ]
# ///
"""Says whether a tuned model wins: medians and win rates of base against tuned, under one or several reward models.

    accelerate launch evaluate_smpo.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --models smpo=smpo-sd15 --prompts_path prompts.txt --output_dir evaluation

Every model draws every prompt with the same seeds. A model's win rate over another is the share of images with the
higher reward at the same prompt and seed, a tie counting a half; cosines, of PickScore and the like, stand times 100.
Intervals are of 95 % and over prompts, as the images of one are not independent. Of several files of prompts each is
a group with numbers of its own. With --run_dir every checkpoint of a run is a model, and the best is named.

    images/NAME/SEED-HASH.png      the images; comparison-NAME.png has base beside tuned, from the largest gain to loss
    gallery.html                   all of them with their scores, to be sorted and filtered in a browser
    scores.csv                     their rewards, a line an image; scores/ keeps them, so that none is scored twice
    results.json, results.md       medians, means, win rates over the base (.json: over all), and the best checkpoint
    blind/index.html               with --blind, a page on which people vote; --votes counts them
    --pairs_path                   the images as preference pairs to train on, labelled by the first reward or --votes

The same command, started again, draws and scores only what is not there yet. With `accelerate launch` several
processes share the work; machines have to share the folder.
"""

import argparse
import hashlib
import html
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import sys
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any, Callable, NamedTuple


# ---- Command line ---------------------------------------------------------------------------------------------------

PROMPTS_ACCEPTED = "UTF-8: txt with a prompt a line, a json list of prompts, or json, jsonl, csv, tsv or Parquet"
MODELS_ACCEPTED = "a pipeline, UNet, training checkpoint or LoRA, each a folder or a Hub name, or a LoRA file"
PUBLISHED = {  # reward models: repository and commit
    "pickscore": ("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"),
    "hpsv2.1": ("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"),
    "imagereward": ("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"),
    "aesthetic": ("trl-lib/ddpo-aesthetic-predictor", "cf4bd10345610935a80a5d3be9a3133c50f121e4"),
    "clip": ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),
}
REWARDS_ACCEPTED = (
    f"{', '.join(PUBLISHED)}, or NAME=PATH of its weights or of a CLIP-style model, a Hub name or a folder"
)


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
from_0 = checked(float, lambda value: value >= 0, "a number, 0 or more")
multiple_of_8 = checked(int, lambda value: value > 0 and value % 8 == 0, "a multiple of 8, the VAE's factor")


def nonempty(text):
    """An argparse type: a text that is not empty, with ~ for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: is the variable set that it comes from?")
    return os.path.expanduser(text)


class Job(NamedTuple):
    """An image to draw, and a line of scores.csv."""

    model: str
    prompt: str
    group: str | None
    seed: int
    image: str  # its file in the output folder


def named_sources(values, flag, taken, problems):
    """`{name: path}` of a flag's values, PATH or NAME=PATH; what is wrong with them is added to the problems."""
    sources = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or "/" in name:  # a path may have an = of its own
            name, path = Path(value).name.removesuffix(".safetensors"), value
        if not path:
            problems.append(f"--{flag} {value} names no path: is the variable set that it comes from?")
        if not re.fullmatch(r"[\w-][\w.-]*", name) or name in taken or name in sources:
            problems.append(
                f"--{flag} {value}: {name!r} cannot name it, as it is taken or has other characters than letters,"
                " digits, '.', '_' and '-'. Give NAME=PATH."
            )
        sources[name] = path
    return sources


def reward_name(text):
    """An argparse type: of what --reward_model takes, the name of a published one in place of its repository."""
    return next((name for name, (model, _) in PUBLISHED.items() if text == model), text)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Medians and win rates, base against tuned.")

    add = parser.add_argument_group("models", "Give --models, --run_dir, or both.").add_argument
    add("--pretrained_model_name_or_path", required=True, type=nonempty, help="Base model: a Hub name or a folder.")
    add("--revision", type=nonempty, help="Revision of the base model on the Hub.")
    add("--variant", type=nonempty, help='Variant of the base model\'s weight files, for example "fp16".')
    add("--models", nargs="+", default=[], help=f"Tuned models, each PATH or NAME=PATH: {MODELS_ACCEPTED}.")
    add("--run_dir", type=nonempty, help="Output folder of a training run: compares its checkpoints, names the best.")

    add = parser.add_argument_group("prompts").add_argument
    text = f"Files, each a group if several: {PROMPTS_ACCEPTED}."
    add("--prompts_path", nargs="+", required=True, type=nonempty, help=text)
    add("--caption_column", default="caption", help="Prompt of the images.")
    add("--max_prompts", type=int_from_1, help="Use the first so many prompts of each file.")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_images_per_prompt", type=int_from_1, default=1, help="Images, each with its own seed.")
    add("--num_inference_steps", type=int_from_1, default=50, help="Denoising steps.")
    add("--guidance_scale", type=from_0, default=7.5, help="Classifier-free guidance.")
    add("--resolution", type=multiple_of_8, default=512, help="Side of the square images, in pixels.")
    add("--seed", type=int_from_0, default=0, help="Seed of the first image; each further one has the next.")
    text = "Precision of the models. Default: float16 on an accelerator, float32 on a CPU."
    add("--dtype", choices=["float32", "float16", "bfloat16"], help=text)
    add("--batch_size", type=int_from_1, default=16, help="Images at a time.")

    add = parser.add_argument_group("reward model").add_argument
    text = f"Reward models, each {REWARDS_ACCEPTED}."
    add("--reward_model", type=reward_name, nargs="+", default=["pickscore"], help=text)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=nonempty, help="Folder for images, scores and tables.")
    trackers = ["tensorboard", "wandb", "trackio", "all", "none"]
    add("--report_to", default="none", choices=trackers, help="Where metrics and pictures go.")
    add("--blind", action="store_true", help="Also makes blind/index.html, a page on which people vote by keys.")
    add("--votes", type=nonempty, nargs="+", help="Files that this page has made: win rates beside the rewards'.")
    text = "Also writes preference pairs to train on, a Parquet file: a prompt's best and worst image by the first"
    add("--pairs_path", type=nonempty, help=f"{text} reward or, with --votes, what people chose between.")
    add("--pairs", choices=["best_worst", "all"], help="Which two images of a prompt. Default: best_worst.")
    return resolve(parser.parse_args(input_args))


def resolve(args):
    """Checks what no type does, and fills in what depends on others; raises `UserError` with a line for each problem.

    --models, with the checkpoints of --run_dir, and --reward_model become `{name: path}`; `args.steps` is
    `{checkpoint: step}`.
    """
    run, pairs, problems = args.run_dir, args.pairs_path, []
    names = os.listdir(run) if run and os.path.isdir(run) else []
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name))
    args.steps = {f"checkpoint-{step}": step for step in steps}
    if not args.models and run is None and (args.blind or not pairs):
        problems.append("Give tuned models with --models, or a run with --run_dir.")
    elif not args.models and run is None and args.num_images_per_prompt < 2:
        problems.append("--pairs_path needs two images of a prompt: give --num_images_per_prompt 2 or --models.")
    if args.revision and Path(args.pretrained_model_name_or_path).exists():
        problems.append("--revision does nothing without a base model on the Hub: leave it out.")
    if run and not steps:
        problems.append(f"--run_dir {run} has no folders named checkpoint-STEP.")
    if args.pairs and (not pairs or args.votes):
        problems.append("--pairs does nothing without --pairs_path, or with --votes, which say what is a pair.")
    if pairs and not pairs.endswith(".parquet"):
        problems.append(f"--pairs_path {pairs} must end in .parquet.")
    if pairs and Path(pairs).exists():
        problems.append(f"--pairs_path {pairs} exists: move it away, or name another file.")
    if args.report_to not in ("all", "none") and importlib.util.find_spec(args.report_to) is None:
        problems.append(f"--report_to {args.report_to} is not installed: pip install -U accelerate {args.report_to}.")
    models = named_sources(args.models, "models", ["base", *args.steps], problems)
    taken = ["best", "uid", "label", "votes", "scores", *Job._fields]
    rewards = named_sources(args.reward_model, "reward_model", taken, problems)
    if problems:
        raise UserError("\n".join(problems))
    args.models = {name: os.path.expanduser(path) for name, path in models.items()}
    args.models |= {name: f"{run}/{name}" for name in args.steps}
    args.reward_model = {name: os.path.expanduser(path) for name, path in rewards.items()}
    return args


# Here, so that a mistake in a flag is told before the imports below, which take seconds.
# ruff: noqa: E402
if __name__ == "__main__":
    with short_errors():
        ARGS = parse_args()


import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm.auto import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import check_min_version, make_image_grid


check_min_version("0.35.0")

# Pillow resizes, on every machine: torchvision, where it is installed, gives other pixels. transformers 4: `use_fast`.
PIL_BACKEND = (
    {"backend": "pil"} if importlib.util.find_spec("transformers.image_processing_backends") else {"use_fast": False}
)
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
KINDS = {  # of models, by a file that tells; with the LoRA's file or the UNet's subfolder
    LORA_FILE: ("lora", LORA_FILE),
    "model_index.json": ("pipeline", None),
    "config.json": ("unet", None),
    "unet/config.json": ("unet", "unet"),
}
ENDS = [0.025, 0.975]  # of a 95 % interval, as quantiles
NUM_RESAMPLES = 4_000  # of the bootstrap
NUM_HALVES = 1_000  # ways to split the prompts into two halves
PAIRS_ROW_GROUP = 64  # pairs of images in memory at a time
FEW_PROMPTS = 20  # below them no interval means much
NUM_COMPARED_PROMPTS = 12
MODEL_FILE = (
    r"(?!(partial-)?checkpoint-[^/]*/)([^/]+/)?([^/]+\.(safetensors|bin|pth?)|[^/]*config\.json|model_index\.json"
    r"|tokenizer\.json|vocab\.json|merges\.txt)$"
)
THUMBNAIL = 256  # width in pixels of an image in a picture of many
BEFORE_FORMULA = r"^(?=[=+@\t\r-])"  # in a cell, as a spreadsheet sees it
MERGE_TIMEOUT = timedelta(days=7)  # how long a process waits at the end for a slower one
ALL = "all"  # the group of all prompts


# ---- The statistics -------------------------------------------------------------------------------------------------


def wins(scores, base_scores):
    """1 where a score is higher than the base's, 0 where it is lower, 0.5 at a tie; arrays of any one shape.

    >>> wins(np.array([3.0, 1.0, 2.0]), np.array([2.0, 2.0, 2.0]))
    array([1. , 0. , 0.5])
    """
    return (scores > base_scores) + 0.5 * (scores == base_scores)


def resample_prompts(num_prompts, seed):
    """How often each of P prompts comes up in each of `NUM_RESAMPLES` draws of P prompts, `[NUM_RESAMPLES, P]`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), NUM_RESAMPLES).astype(float)


def win_interval(rates, counts):
    """Ends of the interval of a mean win rate, from the rates at P prompts `[P]` and `resample_prompts`.

    Wilson's (1927) where every prompt is wholly won or wholly lost; else the percentile bootstrap's, which would give
    100 % to 100 % where all are won.

    >>> win_interval(np.repeat([1.0, 0.0], 50), resample_prompts(100, seed=0)).round(3).tolist()
    [0.404, 0.596]
    """
    count, mean, z = len(rates), rates.mean(), NormalDist().inv_cdf(ENDS[1])
    if not np.isin(rates, [0, 1]).all():
        return np.quantile(counts @ rates / count, ENDS)
    half = z * np.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return np.clip((mean + z**2 / (2 * count) + np.array([-half, half])) / (1 + z**2 / count), 0, 1)


def resampled_medians(values, counts):
    """Median over all images of `values` `[P, images]` in each resample of the prompts, `[NUM_RESAMPLES]`.

    >>> resampled_medians(np.array([[1.0], [2.0], [4.0]]), np.array([[1, 1, 1], [0, 0, 3]])).tolist()
    [2.0, 4.0]
    """
    return np.array([np.median(values.repeat(count, axis=0)) for count in counts.astype(int)])


def win_rate_on_other_half(rates, seed):
    """Win rate of the best of K models, picked on one half of the prompts, on the other: a mean over random halves.

    On the prompts that it was picked on, the best of many looks better than it is. `rates` are `[P, K]`.

    >>> win_rate_on_other_half(np.array([[1.0, 0.0], [1.0, 0.5], [1.0, 0.0]]), seed=0)
    1.0
    """
    half = np.tile(np.arange(len(rates)) < len(rates) // 2, (NUM_HALVES, 1))
    half = np.random.default_rng(seed).permuted(half, axis=1)
    on_other_half = ~half @ rates / (len(rates) - len(rates) // 2)
    return float(on_other_half[np.arange(NUM_HALVES), (half @ rates).argmax(axis=1)].mean())


def with_interval(name, value, ends):
    return {name: float(value), f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}


def values_of(table, reward):
    """`{model: a reward's scores [prompts, images]}` of a table like scores.csv."""
    models, count = table.groupby("model", sort=False)[reward], table["prompt"].nunique()
    return {model: scores.to_numpy().reshape(count, -1) for model, scores in models}


def summarise(table, rewards, seed):
    """Medians and means of every model in a table like scores.csv, and its win rates over every other one.

    Returns:
        Dicts with `reward`, `group`, `model`, `num_prompts`, `mean`, `median` and `median_less_base`, and dicts with
        `reward`, `group`, `model`, `opponent`, `win_rate` and `tie_rate`; the groups are `ALL` and, if any, each.
        Medians, their differences and win rates have intervals, from `..._low` to `..._high`.
    """
    results, duels, groups = [], [], {ALL: table}
    groups |= {name: rows for name, rows in table.groupby("group", sort=False) if name != ALL}
    for reward, (group, rows) in itertools.product(rewards, groups.items()):
        values = values_of(rows, reward)
        base, counts = values["base"], resample_prompts(len(values["base"]), seed)
        resampled = {model: resampled_medians(of_image, counts) for model, of_image in values.items()}
        for model, of_image in values.items():
            key = {"reward": reward, "group": group, "model": model}
            row = key | {"num_prompts": len(of_image), "mean": float(of_image.mean())}
            row |= with_interval("median", np.median(of_image), np.quantile(resampled[model], ENDS))
            less, ends = np.median(of_image) - np.median(base), resampled[model] - resampled["base"]
            results.append(row | with_interval("median_less_base", less, np.quantile(ends, ENDS)))
            for opponent in (name for name in values if name != model):
                won = wins(of_image, values[opponent])
                row = key | {"opponent": opponent, "tie_rate": float((won == 0.5).mean())}
                duels.append(row | with_interval("win_rate", won.mean(), win_interval(won.mean(axis=1), counts)))
    return results, duels


# ---- Prompts --------------------------------------------------------------------------------------------------------


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


def read_prompts(path, column):
    """The prompts in a file of --prompts_path, in which empty ones are left out; raises `UserError`."""
    suffix, utf8 = Path(path).suffix.lower(), {"encoding": "utf-8-sig"}  # with or without a byte-order mark
    with explain_errors("prompts_path", path, PROMPTS_ACCEPTED):
        if suffix == ".txt":
            table = pd.DataFrame({column: Path(path).read_text(**utf8).splitlines()})
        elif suffix == ".parquet":
            names = pq.read_schema(path).names
            table = pd.read_parquet(path, columns=[column]) if column in names else pd.DataFrame(columns=names)
        elif suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, **utf8)
            if not isinstance(table.index, pd.RangeIndex):  # pandas would shift the cells
                raise ValueError(f"a line has more cells than the first: quote texts with {separator!r}")
        else:
            table = pd.read_json(path, lines=suffix == ".jsonl", dtype=False, **utf8).rename(columns={0: column})
        if column not in table:
            raise ValueError(f"it has no --caption_column {column}, but {', '.join(map(str, table.columns))}")
        for prompt in table[column].dropna():
            if not isinstance(prompt, str):
                raise ValueError(f"--caption_column {column} holds {repr(prompt)[:80]}, which is no text")
        return [prompt.strip() for prompt in table[column].dropna() if prompt.strip()]


def load_prompts(args):
    """`{prompt: its group}`, the file's name where there are several, else None; each once, in the order of the files.

    Raises `UserError` if there is none.
    """
    group_of, stems = {}, [Path(path).stem for path in args.prompts_path]
    if len(stems) > 1 and len({ALL, *stems}) <= len(stems):
        raise UserError(f"--prompts_path: {', '.join(stems)} name groups, each its own, and none of them {ALL}.")
    for path, stem in zip(args.prompts_path, stems):
        for prompt in read_prompts(path, args.caption_column)[: args.max_prompts]:
            group_of.setdefault(prompt, stem if len(stems) > 1 else None)
    if not group_of:
        raise UserError(f"--prompts_path {' '.join(args.prompts_path)} has no prompts: all is empty.")
    return group_of


# ---- Models ---------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A model as it is now: a local file or folder, or a commit of a Hub repository."""

    path: str
    commit: str | None  # None where it is local
    files: list  # their names, relative to the folder
    identity: str  # the commit, or a hash of the files' names, sizes and times

    @property
    def kind(self):
        """One of "pipeline", "unet", "lora", with its subfolder or file; (None, None) if it is none of them."""
        weights = [file for file in self.files if re.fullmatch(r"[^/]+\.safetensors", file)]
        kinds = KINDS | {file: ("lora", file) for file in weights if len(weights) == 1}
        return next((kind for file, kind in kinds.items() if file in self.files), (None, None))


def digest(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def locate(flag, path, revision=None):
    """The `Source` that a flag names; raises `UserError` if there is none.

    Of a Hub repository only LoRAs, and what tells of what kind it is, are downloaded; without a network it is the
    newest commit on this machine.
    """
    local, commit = Path(path), None
    if not local.exists():
        with explain_errors(flag, path, "a file or folder that exists, or the name of a Hub repository"):
            local = Path(snapshot_download(path, revision=revision, allow_patterns=list(KINDS)))
            commit = local.name
            if not any((local / file).exists() for file in KINDS):  # a LoRA under a name of its own
                snapshot_download(path, revision=commit, allow_patterns="*.safetensors")
    root = local.parent if local.is_file() else local
    folders = [] if local.is_file() else os.walk(local, followlinks=True)
    files = [local] if local.is_file() else [Path(folder) / name for folder, _, names in folders for name in names]
    names = [file.relative_to(root).as_posix() for file in sorted(files)]
    # What a model is made of, and not a run's checkpoints, which may be deleted, nor what is written beside it.
    lasting = [name for name in names if local.is_file() or re.match(MODEL_FILE, name)]
    with explain_errors(flag, path, "a model that is whole and that nothing deletes meanwhile"):
        stats = [(root / name).stat() for name in lasting]
    facts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(lasting, stats)]
    return Source(path, commit, names, f"{path}@{commit}" if commit else digest(facts))


def locate_models(args):
    """The `Source` of base and tuned models by name; raises `UserError` if one is not there or of no accepted kind."""
    base = args.pretrained_model_name_or_path
    sources = {"base": locate("pretrained_model_name_or_path", base, args.revision)}
    if sources["base"].kind[0] != "pipeline":
        raise UserError(
            f"--pretrained_model_name_or_path {base} is no pipeline: it has no model_index.json. Make one of a single"
            " file: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), or ...XLPipeline."
        )
    for name, path in args.models.items():
        flag, given = ("run_dir", path) if name in args.steps else ("models", f"{name}={path}")
        sources[name] = locate(flag, path)
        if sources[name].kind[0] is None:
            listed = ", ".join(sources[name].files[:12]) or "none of the files that tell"
            raise UserError(f"--{flag} {given} holds {listed}.\nAccepted: {MODELS_ACCEPTED}.")
    return sources


def load_pipeline(source, base, device, args):
    """The pipeline of a model, on top of the base if it is none itself; raises `UserError` if it cannot be loaded."""
    (kind, part), dtype = source.kind, {"torch_dtype": getattr(torch, args.dtype)}
    whole = source if kind == "pipeline" else base
    parts = {"safety_checker": None, "variant": args.variant if whole is base else None, **dtype}
    flag = "run_dir" if source.path in map(args.models.get, args.steps) else "models"
    with explain_errors("pretrained_model_name_or_path" if source is base else flag, source.path, MODELS_ACCEPTED):
        if kind == "unet":  # in place of the base's, which is not read
            options = {"subfolder": part, "revision": source.commit, **dtype}
            parts["unet"] = UNet2DConditionModel.from_pretrained(source.path, **options)
        pipeline = DiffusionPipeline.from_pretrained(whole.path, revision=whole.commit, **parts)
        if kind == "lora":
            pipeline.load_lora_weights(source.path, weight_name=part, revision=source.commit)
            if not pipeline.get_active_adapters():
                raise ValueError("none of its layers is one of the base model's")
        pipeline.to(device)  # what had no weights fails here
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- Images ---------------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Lets `write` fill a file, which then is on the disk, and whole; raises `UserError` if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        advice = "make room, or name another folder (machines have to share it), and start the same command again"
        raise UserError(f"{path} cannot be written ({error}). What was finished before is kept: {advice}.") from error


def save_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def list_jobs(sources, group_of, args):
    """The `Job` of every image: model by model, prompt by prompt, and the images of a prompt, all seeds in a row.

    Weights, prompt and settings are in its file's name, so that none of others passes for it.
    """
    jobs, count = [], args.num_images_per_prompt
    settings = [args.num_inference_steps, args.guidance_scale, args.resolution, args.dtype, args.variant]
    for name, (number, (prompt, group)), i in itertools.product(sources, enumerate(group_of.items()), range(count)):
        seed = args.seed + number * count + i
        facts = [sources["base"].identity, sources[name].identity, prompt, seed, *settings]
        jobs.append(Job(name, prompt, group, seed, f"images/{name}/{seed:05d}-{digest(facts)}.png"))
    return jobs


def batches(jobs, description, args):
    """--batch_size jobs at a time, with a progress bar in one process of each machine."""
    parts = [jobs[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    return tqdm(parts, description, unit="batch", disable=not jobs or not PartialState().is_local_main_process)


def draw_images(jobs, sources, args):
    """Draws and saves those images of one model that are not there yet."""
    folder = Path(args.output_dir)
    missing = [job for job in jobs if not (folder / job.image).exists()]
    if not missing:
        return
    name = missing[0].model
    pipeline = load_pipeline(sources[name], sources["base"], PartialState().device, args)
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    options |= {"height": args.resolution, "width": args.resolution}
    for batch in batches(missing, f"Images of {name}", args):
        # On the CPU, so that an image does not depend on the device or on the batch it is drawn in.
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        images = pipeline([job.prompt for job in batch], generator=generators, **options).images
        for job, image in zip(batch, images):
            if not image.getbbox():
                problem = f"{job.image} is all black: {name} is broken, or overflows in {args.dtype}"
                raise UserError(f"{problem}: give another --dtype, or a model that is whole.")
            write_whole(folder / job.image, lambda file: image.save(file, "png"))


# ---- Reward models: published ones and any CLIP-style model, on transformers' own classes ---------------------------

OPEN_CLIP_NAMES = {  # of tensors in open_clip, as regular expressions that are replaced in turn, in transformers' CLIP
    r"^visual\.proj$": "visual_projection.weight",
    "^text_projection$": "text_projection.weight",
    "^(?=token|positional|transformer|ln_final)": "text_model.",
    r"^visual\.": "vision_model.",
    "class_embedding|token_embedding": r"embeddings.\g<0>",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "ln_": "layer_norm",
    r"transformer\.resblocks": "encoder.layers",
    r"attn\.": "self_attn.",
    "c_fc": "fc1",
    "c_proj": "fc2",
}
BLIP_NAMES = {  # the same of BLIP's image encoder; its text encoder has the same names in both
    "^cls_token": "embeddings.class_embedding",
    "^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^norm\.": "post_layernorm.",
    "^blocks": "encoder.layers",
    r"\.norm": ".layer_norm",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.attn\.qkv": ".self_attn.qkv",
}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
BLIP_VISION = transformers.BlipVisionConfig(**VIT_L, image_size=224, layer_norm_eps=1e-6)
BLIP_TEXT = transformers.BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
PADDED = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}  # tokens
CLIP_H = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")  # repository and commit
CLIP_L = PUBLISHED["clip"]
BERT = ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")


class SquareProcessor(NamedTuple):
    """Images as OpenAI's CLIP crops them, or as HPSv2 pads them with black; called as a processor of transformers.

    The pixels are torchvision's, which crops one pixel elsewhere than transformers, and shrinks tensors antialiased.
    """

    size: int
    pad: bool = False

    def __call__(self, images, return_tensors):
        size, ends = self.size, images.size
        if self.pad:
            width, height = (max(1, round(end * (size / max(ends)))) for end in ends)
            left, top = (size - width) // 2, (size - height) // 2
            pixels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None] / 255
            pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        else:
            width, height = (int(size * end / min(ends)) for end in ends)
            left, top = -round((width - size) / 2), -round((height - size) / 2)
            image = np.array(images.resize((width, height), Image.Resampling.BICUBIC))
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        pixels = torch.nn.functional.pad(pixels, (left, size - width - left, top, size - height - top))  # or crops
        mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return {"pixel_values": (pixels - mean) / std}


def load_clip(file, model, base):
    """A CLIP-style model as it is."""
    model = transformers.AutoModel.from_pretrained(**model)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"it is a {type(model).__name__}, not a CLIP-style model")
    return model, transformers.AutoImageProcessor.from_pretrained(**base, **PIL_BACKEND)


def load_hpsv2(file, model, base):
    """HPSv2 (https://arxiv.org/abs/2306.09341), open_clip's ViT-H-14, as the CLIP that `base` configures."""
    weights = torch.load(file, "cpu", weights_only=True)["state_dict"]
    weights |= {name: weights[name].T.contiguous() for name in ("visual.proj", "text_projection")}
    weights = renamed(weights, OPEN_CLIP_NAMES)
    for name in [name for name in weights if "in_proj_" in name]:
        parts = zip("qkv", weights.pop(name).chunk(3))
        weights |= {name.replace("in_proj_", f"{letter}_proj."): part for letter, part in parts}
    model = with_weights(transformers.CLIPModel, transformers.AutoConfig.from_pretrained(**base), weights)
    return model, SquareProcessor(model.config.vision_config.image_size, pad=True)


def load_aesthetic(file, model, base):
    """LAION's head on a CLIP, https://github.com/christophschuhmann/improved-aesthetic-predictor."""
    model = transformers.AutoModel.from_pretrained(**base)
    model.head = linear_head(torch.load(file, "cpu", weights_only=True))
    return model, SquareProcessor(model.config.vision_config.image_size)


def load_image_reward(file, model, base):
    """ImageReward (https://arxiv.org/abs/2304.05977): BLIP, and a head on its text encoder's first state."""
    parts = defaultdict(dict)
    for name, value in torch.load(file, "cpu", weights_only=True).items():
        part, _, name = name.removeprefix("blip.").partition(".")
        parts[part][name] = value
    parts["text_encoder"].pop("embeddings.position_ids", None)
    model = with_weights(transformers.BlipTextModel, BLIP_TEXT, parts["text_encoder"], add_pooling_layer=False)
    vision_weights = renamed(parts["visual_encoder"], BLIP_NAMES)
    model.vision = with_weights(transformers.BlipVisionModel, BLIP_VISION, vision_weights)
    model.head = linear_head(parts["mlp"])
    return model, SquareProcessor(BLIP_VISION.image_size)


def renamed(weights, names):
    """Tensors by names in which regular expressions are replaced, one after the other."""
    for old, new in names.items():
        weights = {re.sub(old, new, name): value for name, value in weights.items()}
    return weights


def with_weights(model_class, config, weights, **options):
    """A model of transformers that has these weights and no others."""
    options |= {"config": config, "state_dict": weights, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = model_class.from_pretrained(None, **options)
    if any(found.values()):
        raise ValueError(f"it is no {model_class.__name__} of this size: {found}")
    return model


def linear_head(weights):
    """LAION's and ImageReward's linear layers; heads with ReLUs, whose layers have other numbers, are refused."""
    sizes = [weights["layers.0.weight"].shape[1], 1024, 128, 64, 16, 1]
    layers = [torch.nn.Linear(*ends) for ends in itertools.pairwise(sizes)]
    head = torch.nn.Sequential(OrderedDict(zip("02467", layers)))  # dropout in between, which does nothing here
    head.load_state_dict({name.removeprefix("layers."): value for name, value in weights.items()})
    return head


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
def embed_texts(model, tokenizer, texts):
    """Embeddings of texts, cut at the model's length (77 tokens for CLIP): fp32 `[N, D]`, each of length 1."""
    tokens = tokenizer(texts, max_length=model.config.text_config.max_position_embeddings, **PADDED)
    return unit_features(model.get_text_features(**tokens.to(model.device)))


def score_cosine(model, tokenizer, pixel_values, texts):
    """Cosines of images and texts. A text is embedded once."""
    number, texts = pd.factorize(np.asarray(texts, dtype=object))
    return (embed_images(model, pixel_values) * embed_texts(model, tokenizer, texts.tolist())[number]).sum(-1)


def score_aesthetic(model, tokenizer, pixel_values, texts):
    """How people would rate the images from 1 to 10, without the texts."""
    return model.head(embed_images(model, pixel_values))[:, 0]


@torch.no_grad()
def score_image_reward(model, tokenizer, pixel_values, texts):
    """ImageReward, less its mean on its own data and over its standard deviation there."""
    tokens = tokenizer(list(texts), max_length=35, **PADDED).to(model.device)
    seen = model.vision(pixel_values.to(model.device, model.dtype)).last_hidden_state
    states = model(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
    return (model.head(states[:, 0].float())[:, 0] - 0.16717362830052426) / 1.0333394966054072


class Reward(NamedTuple):
    """A kind of reward model: what its checkpoint is, and how it is loaded and scores."""

    base: tuple = CLIP_H  # repository and commit of the tokenizer, and of what else the checkpoint lacks
    file: str = "config.json"  # of the checkpoint, which `load` reads
    load: Callable = load_clip
    score: Callable = score_cosine
    scale: int = 100  # by which people multiply the scores
    label_range: tuple | None = None  # of the scores in published labels


REWARDS = {
    "pickscore": Reward(label_range=(0.11543526500463486, 0.28201571106910706)),
    "hpsv2.1": Reward(CLIP_H, "HPS_v2.1_compressed.pt", load_hpsv2),
    "imagereward": Reward(BERT, "ImageReward.pt", load_image_reward, score_image_reward, 1),
    "aesthetic": Reward(CLIP_L, "aesthetic-model.pth", load_aesthetic, score_aesthetic, 1),
    "clip": Reward(CLIP_L),
}


class Scorer(NamedTuple):
    """A reward model, frozen and on its device."""

    reward: Reward
    model: torch.nn.Module
    tokenizer: Any
    image_processor: Any  # makes `pixel_values` of an image, in any process
    source: dict  # of `find_reward`, and what else tells its scores from another's

    def score(self, pixel_values, texts):
        """Raw scores of N images `[N, 3, H, W]` by their texts: fp32 `[N]`."""
        return self.reward.score(self.model, self.tokenizer, pixel_values, texts)


def locate_file(path, file, revision=None):
    """Where a file lies, which is `path` or in this folder or Hub repository, and the commit of the repository."""
    found = path if os.path.isfile(path) else cached_file(path, file, revision=revision)
    return found, None if os.path.exists(path) else Path(found).parent.name


def find_reward(name, path):
    """Where the reward model NAME=PATH lies, and at which commits, as `load_reward` takes it; NAME=NAME is published.

    If no tokenizer lies at PATH, that and all else that a checkpoint lacks is what the published one goes with; for
    other names than those of `REWARDS` it is PickScore's. Raises `UserError` if something is not there.
    """
    reward, published, commit = REWARDS.get(name, Reward()), name == path and name in REWARDS, None
    if published:
        path, commit = PUBLISHED[name]
    base, base_commit = reward.base
    with explain_errors("reward_model", path, REWARDS_ACCEPTED):
        _, commit = locate_file(path, reward.file, commit)
        if not published and not os.path.isfile(path):
            # None is found if it has none; a connection that fails is an error, not another tokenizer.
            optional = {"revision": commit, "_raise_exceptions_for_missing_entries": False}
            if any(cached_file(path, file, **optional) for file in ("tokenizer_config.json", "tokenizer.json")):
                base, base_commit = path, commit
    return {
        "name": name, "reward_model": path, "revision": commit, "reward_processor": base,
        "processor_revision": base_commit, "label_range": reward.label_range if published else None,
    }  # fmt: skip


def load_reward(source, device, dtype):
    """The `Scorer` of what `find_reward` gives; raises `UserError` if it cannot be loaded."""
    reward, path = REWARDS.get(source["name"], Reward()), source["reward_model"]
    own = {"pretrained_model_name_or_path": path, "revision": source["revision"]}
    base = {"pretrained_model_name_or_path": source["reward_processor"], "revision": source["processor_revision"]}
    with explain_errors("reward_model", path, REWARDS_ACCEPTED):
        file, _ = locate_file(path, reward.file, source["revision"])
        model, image_processor = reward.load(file, own, base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**base)
    head = model._modules.pop("head", None)  # stays in fp32
    model = model.requires_grad_(False).eval().to(device, getattr(torch, dtype))
    if head is not None:
        model.head = head.requires_grad_(False).to(device)
    return Scorer(reward, model, tokenizer, image_processor, source)


# ---- Scores ---------------------------------------------------------------------------------------------------------


def load_scorers(device, args):
    """What scores, `{reward: Scorer}`; its `source` has all that tells its scores from another's."""
    named = args.reward_model.items()
    scorers = {name: load_reward(find_reward(name, path), device, args.dtype) for name, path in named}
    for scorer in scorers.values():
        paths = [scorer.source["reward_model"], scorer.source["reward_processor"]]
        files = [locate("reward_model", path).identity for path in paths if os.path.exists(path)]
        scorer.source.update(files=files, image_processor=repr(scorer.image_processor), dtype=args.dtype)
    return scorers


def score_key(job, scorer, args):
    """What a score is kept under: the image's file and its time, and a hash of the reward."""
    facts = [scorer.reward.file, {**scorer.source, "name": None}]  # another name makes no other score
    return f"{job.image} {(Path(args.output_dir) / job.image).stat().st_mtime_ns} {digest(facts)}"


def kept_scores(args):
    """`{key: score}`, what all processes have kept."""
    paths = Path(args.output_dir).glob("scores/*.json")
    return {key: score for path in paths for key, score in json.loads(path.read_text()).items()}


def score_missing(jobs, description, kept, scorers, args):
    """Scores those images that have no score among `kept` yet, and adds what a batch gives, also as a file of its own;
    raises `UserError` at a score that is not finite."""
    folder = Path(args.output_dir)
    keys = {job: {reward: score_key(job, scorer, args) for reward, scorer in scorers.items()} for job in jobs}
    missing = [job for job in jobs if not kept.keys() >= set(keys[job].values())]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without holding up the others
        for batch in batches(missing, description, args):
            images = dict(zip(batch, pool.map(lambda job: Image.open(folder / job.image).convert("RGB"), batch)))
            for reward, scorer in scorers.items():
                new = [job for job in batch if keys[job][reward] not in kept]
                if not new:
                    continue
                pixels = pool.map(lambda job: scorer.image_processor(images[job], return_tensors="pt"), new)
                pixels = torch.cat([of_image["pixel_values"] for of_image in pixels])
                scores = scorer.score(pixels, [job.prompt for job in new]).cpu().double().numpy()
                for job, score in zip(new, scores):
                    if not math.isfinite(score):
                        raise UserError(
                            f"{reward} gives {score} to {folder / job.image} ({job.prompt!r}), which ranks nothing. It"
                            " is damaged, or overflows in float16: --dtype float32 draws and scores all anew."
                        )
                found = {keys[job][reward]: scorer.reward.scale * score for job, score in zip(new, scores)}
                save_text(folder / "scores" / f"{digest(list(found))}.json", json.dumps(found))
                kept |= found


# ---- Tables and pictures --------------------------------------------------------------------------------------------


def escape_markdown(text):
    r"""A text so that Markdown, and the HTML in it, shows it as it is, `a|b <i>` as `a\|b &lt;i&gt;`."""
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def with_ends(row, name, form):
    """A number of `summarise` and its interval as a text."""
    return f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"


def as_markdown(results, duels):
    """What `summarise` and `count_votes` return as a table in Markdown."""
    over_base = {(row["reward"], row["group"], row["model"]): row for row in duels if row["opponent"] == "base"}
    lines = ["| reward | prompts | model | median score | less the base's | mean score | win rate over base | ties |"]
    lines.append("|---" * 8 + "|")
    for row in results:
        few = ", too few for an interval to mean much" * (row["num_prompts"] < FEW_PROMPTS)
        cells = [row["reward"], f"{escape_markdown(row['group'])} ({row['num_prompts']}{few})", row["model"]]
        cells += [with_ends(row, "median", ".3f"), with_ends(row, "median_less_base", "+.3f"), f"{row['mean']:.3f}"]
        duel = over_base.get((row["reward"], row["group"], row["model"]))  # the base has none
        cells += [with_ends(duel, "win_rate", ".1%"), f"{duel['tie_rate']:.1%}"] if duel else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nIntervals are of 95 %.\n"


def name_best(table, reward, duels, args):
    """The checkpoint that wins most often over the base under a reward: its row, and a sentence on it."""
    key = {"reward": reward, "group": ALL, "opponent": "base"}.items()
    rows = [row for row in duels if key <= row.items() and row["model"] in args.steps]
    best, values = max(rows, key=lambda row: row["win_rate"]), values_of(table, reward)
    rates = np.stack([wins(values[name], values["base"]).mean(axis=1) for name in args.steps], axis=1)
    honest = win_rate_on_other_half(rates, args.seed)
    text = (
        f"**{best['model']}** is the best of {len(rows)} checkpoints under {reward}: it wins over the base"
        f" {with_ends(best, 'win_rate', '.1%')}. To pick the best of many and to measure it on the same prompts is"
        f" optimistic: picked on one half of the prompts, the best wins {honest:.1%} on the other half."
    )
    return {**best, "step": args.steps[best["model"]], "win_rate_on_other_half": honest}, text


def gains_over_base(table, rewards):
    """Mean score of each prompt less the base's, in a column for each "MODEL by REWARD"."""
    means = table.pivot_table(rewards, "prompt", "model", sort=False)
    names = itertools.product(table["model"].unique()[1:], rewards)
    gains = {f"{model} by {reward}": means[reward, model] - means[reward, "base"] for model, reward in names}
    return pd.DataFrame(gains, index=means.index)


def compare(name, gains, table, args):
    """A picture with a row a prompt, each base image left of the model's at the same seed, for prompts evenly spaced
    from the largest to the smallest of their `gains`."""
    ranked = gains.sort_values(ascending=False, kind="stable").index
    chosen = ranked[np.linspace(0, len(ranked) - 1, min(NUM_COMPARED_PROMPTS, len(ranked))).round().astype(int)]
    both = table[table["model"].isin(["base", name])].sort_values("seed", kind="stable")
    paths = both.groupby("prompt")["image"].agg(list).loc[chosen]
    images = [Image.open(Path(args.output_dir) / path).resize((THUMBNAIL, THUMBNAIL)) for path in paths.explode()]
    return make_image_grid(images, rows=len(chosen), cols=len(images) // len(chosen))


def write_results(table, votes, sources, scorers, args):
    """Writes tables and pictures, prints results.md, and returns what is in results.json."""
    folder, rewards = Path(args.output_dir), list(scorers)
    results, duels = summarise(table, rewards, args.seed)
    by_vote = count_votes(votes, args.seed)
    record, text = {"results": results, "win_rates": duels + by_vote}, as_markdown(results, duels)
    for row in by_vote:
        win_rate, ties = with_ends(row, "win_rate", ".1%"), f"{row['tie_rate']:.1%}"
        text += f"\n{row['num_votes']} votes: **{row['model']}** wins over the base {win_rate}, ties {ties}\n"
    if args.steps:
        record["best"], sentence = name_best(table, rewards[0], duels, args)
        text = f"{sentence}\n\n{text}"
    record["models"] = {name: source.identity for name, source in sources.items()}
    record["rewards"] = {reward: scorer.source for reward, scorer in scorers.items()}
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "pillow")
    record["versions"] = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
    record |= {"command": sys.argv, "args": vars(args)}
    save_text(folder / "results.json", json.dumps(record, indent=2))
    save_text(folder / "results.md", text)
    texts = table[["prompt", "group"]].replace(BEFORE_FORMULA, "'", regex=True)
    save_text(folder / "scores.csv", table.assign(**texts).to_csv(index=False, lineterminator="\n"))
    gains = gains_over_base(table, rewards)
    write_gallery(table, gains, rewards, args)
    for name in args.models:
        sheet = compare(name, gains[f"{name} by {rewards[0]}"], table, args)
        write_whole(folder / f"comparison-{name}.png", lambda file: sheet.save(file, "png"))
    print(text)
    return record


def send_results(record, args):
    """Sends medians, win rates over the base, and the comparisons, to the trackers of --report_to."""
    accelerator = Accelerator(log_with=args.report_to, project_dir=str(Path(args.output_dir) / "logs"))
    config = {flag: value if isinstance(value, (int, float)) else str(value) for flag, value in vars(args).items()}
    accelerator.init_trackers("smpo-evaluation", config=config)
    numbers = [("median", row) for row in record["results"]]
    numbers += [("win_rate", row) for row in record["win_rates"] if row["opponent"] == "base"]
    values = {f"{row['reward']}/{row['group']}/{row['model']}/{name}": row[name] for name, row in numbers}
    accelerator.log(values, step=0)
    pictures = {name: Image.open(Path(args.output_dir) / f"comparison-{name}.png") for name in args.models}
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):  # few others take images
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image)[None] for name, image in pictures.items()}, step=0, **options)
        tracker.finish()  # not `end_training`, for which the other processes would have to be here


# ---- Pages to look at -----------------------------------------------------------------------------------------------

GALLERY = """<!doctype html>
<meta charset="utf-8">
<title>Gallery</title>
<style>
body { font: 14px sans-serif }
section { border-top: 1px solid #ccc; content-visibility: auto; contain-intrinsic-size: auto 300px }
figure { display: inline-block; margin: 4px } img { display: block; width: 192px; height: 192px }
</style>
<p><input id="text" placeholder="words of the prompt or group">
<select id="order"><option value="">as given
{% for name in names %}<option value="{{ loop.index0 }}">by gain of {{ name }}{% endfor %}</select>
<span id="count"></span> prompts; ★ has the highest score of the {{ rivals[-1] }}</p>
<main>{% for prompt, images in of_prompt %}
<section data-gains="{{ gains[prompt] | tojson }}"><p>{{ prompt }} <i>{{ images.iloc[0].group or "" }}</i></p>
{% for image in images.itertuples() %}<figure>
<a href="{{ image.image }}"><img loading="lazy" src="{{ image.image }}" alt=""></a>
{{ image.model }}{% for score in image.scores %}<br>{{ score }}{% endfor %}</figure>
{% endfor %}</section>{% endfor %}</main>
<script>
const [text, order, count] = ["text", "order", "count"].map(id => document.getElementById(id))
const main = document.querySelector("main"), sections = [...main.children]
const gain = section => order.value && JSON.parse(section.dataset.gains)[order.value]
const fits = section => section.firstChild.textContent.toLowerCase().includes(text.value.toLowerCase())
document.oninput = () => {
  main.replaceChildren(...sections.filter(fits).sort((a, b) => gain(b) - gain(a)))
  count.textContent = main.children.length
}
document.oninput()
</script>
"""


def write_gallery(table, gains, rewards, args):
    """Writes gallery.html: every prompt with its images, seed by seed, and their scores, to be sorted and filtered."""
    rivals = ["prompt", "seed"] if table["model"].nunique() > 1 else ["prompt"]
    stars = table[rewards] == table.groupby(rivals)[rewards].transform("max")
    texts = table[rewards].map(" {:.3f}".format) + stars.replace({True: " ★", False: ""})
    shown = table.assign(scores=[[name + text for name, text in zip(rewards, row)] for row in texts.to_numpy()])
    of_prompt = shown.sort_values("seed", kind="stable").groupby("prompt", sort=False)
    data = {"names": gains.columns, "gains": gains.T.to_dict("list"), "of_prompt": of_prompt, "rivals": rivals}
    page = jinja2.Template(GALLERY, autoescape=True).render(data)
    save_text(Path(args.output_dir) / "gallery.html", page)


BLIND = """<!doctype html>
<meta charset="utf-8">
<title>Which is better?</title>
<style>body { font: 18px sans-serif; text-align: center } img { max-width: 48%; max-height: 75vh }</style>
<p id="prompt"></p>
<p><img id="left" alt="1"> <img id="right" alt="2"></p>
<p>Press 1 for the left, 2 for the right, 0 for neither. <span id="progress"></span>
<a id="save" download="votes.json" href="#">Download votes.json</a> <a id="forget" href="#">Start over</a></p>
<script>
const duels = {{ duels | tojson }}, key = {{ key | tojson }}, votes = JSON.parse(localStorage.getItem(key) || "[]")
const [prompt, left, right, progress, save, forget] =
  ["prompt", "left", "right", "progress", "save", "forget"].map(id => document.getElementById(id))
const show = () => {
  const duel = duels[votes.length] || { prompt: "That was the last one. Download the votes.", left: "", right: "" }
  prompt.textContent = duel.prompt
  left.src = duel.left
  right.src = duel.right
  progress.textContent = `${votes.length} of ${duels.length}`
  save.href = "data:application/json," + encodeURIComponent(JSON.stringify(votes))
}
document.onkeydown = event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return
  if (!["0", "1", "2"].includes(event.key) || votes.length === duels.length) return
  if (!left.complete || !left.naturalWidth || !right.complete || !right.naturalWidth) return  // not to be seen yet
  const duel = duels[votes.length], voter = votes.length ? votes[0].voter : Math.random().toString(36).slice(2)
  votes.push({ left: duel.left, right: duel.right, vote: Number(event.key), voter })
  localStorage.setItem(key, JSON.stringify(votes))  // a closed page goes on where it was
  show()
}
forget.onclick = () => {
  if (confirm("Forget all votes of this browser?")) votes.length = 0
  localStorage.setItem(key, JSON.stringify(votes))
  show()
}
show()
</script>
"""


def write_blind(table, args):
    """Fills blind/, which can be handed on: a page with base and tuned image of a seed side by side, without names."""
    folder, rng, duels = Path(args.output_dir) / "blind", np.random.default_rng(args.seed), []
    names = {image: f"{digest(image)}.png" for image in table["image"]}  # which do not tell the model
    base = table[table["model"] == "base"].set_index("seed")["image"]
    for job in table[table["model"] != "base"].itertuples():
        left, right = (names[image] for image in rng.permutation([job.image, base[job.seed]]))
        duels.append({"prompt": job.prompt, "left": left, "right": right})
    rng.shuffle(duels)
    for path in {*folder.glob("[0-9a-f]" * 16 + ".png")} - {folder / name for name in names.values()}:
        path.unlink()  # of a model that is not compared any more
    for image, name in names.items():  # the name is a hash of all that made the image
        if not (folder / name).exists():
            write_whole(folder / name, lambda file: file.write((folder.parent / image).read_bytes()))
    page = jinja2.Template(BLIND, autoescape=True).render(duels=duels, key=digest(duels))
    save_text(folder / "index.html", page)


def read_votes(jobs, args):
    """A line for each of --votes: the tuned model's `image` and the `base_image`, the `model` and `prompt`, and what
    it has `won`, 1, 0 or, at a tie, 0.5."""
    jobs = {f"{digest(job.image)}.png": job for job in jobs}
    votes = {}
    for path in args.votes or []:
        with explain_errors("votes", path, "what the page of --blind in this --output_dir has made"):
            for vote in json.loads(Path(path).read_text()):
                if not {vote["left"], vote["right"]} <= jobs.keys():
                    advice = "give all that was given with --blind; a model with other files is another"
                    raise ValueError(f"it compares images that are not of this evaluation: {advice}")
                left, right = jobs[vote["left"]], jobs[vote["right"]]
                won = {1: 1.0, 2: 0.0, 0: 0.5}[vote["vote"]]
                tuned, base, won = (right, left, 1 - won) if left.model == "base" else (left, right, won)
                # Once a voter: two files may be of one, the later with all that the earlier has.
                votes[vote.get("voter", path), tuned, base] = (tuned.image, base.image, tuned.model, tuned.prompt, won)
    if args.votes and not votes:
        raise UserError(f"--votes {' '.join(args.votes)}: there are no votes in it.")
    return pd.DataFrame(votes.values(), columns=["image", "base_image", "model", "prompt", "won"])


def count_votes(votes, seed):
    """Win and tie rates over the base by votes, as `summarise` has them: means over prompts of those over votes."""
    rows = []
    for model, of_model in votes.assign(tie=votes["won"] == 0.5).groupby("model", sort=False):
        rates = of_model.groupby("prompt")[["won", "tie"]].mean()
        row = {"reward": "votes", "group": ALL, "model": model, "opponent": "base", "num_votes": len(of_model)}
        ends = win_interval(rates["won"].to_numpy(), resample_prompts(len(rates), seed))
        rows.append(row | with_interval("win_rate", rates["won"].mean(), ends) | {"tie_rate": rates["tie"].mean()})
    return rows


# ---- Pairs to train on ----------------------------------------------------------------------------------------------


def couple_images(table, votes, reward, args):
    """Couples of lines of scores.csv, dicts that also have a `uid` and a `label`, P(it is preferred): of each prompt
    the best and the worst image (--pairs all: every two) or, with --votes, what people chose between, and the mean of
    the votes."""
    uids = [hashlib.sha256((Path(args.output_dir) / image).read_bytes()).hexdigest() for image in table["image"]]
    lines = {line["image"]: line for line in table.assign(uid=uids).to_dict("records")}
    if args.votes:
        labelled = votes.groupby(["image", "base_image"], sort=False)["won"].mean().items()
        labelled = [([lines[image] for image in images], share) for images, share in labelled]
    else:
        labelled = []
        for _, rows in table.groupby("prompt", sort=False):
            ranked = [lines[image] for image in rows.sort_values(reward, ascending=False, kind="stable")["image"]]
            couples = itertools.combinations(ranked, 2) if args.pairs == "all" else [(ranked[0], ranked[-1])]
            labelled += [(couple, float(wins(couple[0][reward], couple[1][reward]))) for couple in couples]
    couples = (({**best, "label": share}, {**worst, "label": 1 - share}) for (best, worst), share in labelled)
    ordered = (sorted(couple, key=lambda line: line["uid"]) for couple in couples)  # which is first says nothing
    return [(first, second) for first, second in ordered if first["uid"] != second["uid"]]


def write_pairs(table, votes, scorers, args):
    """Writes --pairs_path, which the training scripts take as --dataset_name: Pick-a-Pic's columns, all scores and,
    unless people have voted, the first reward's soft label. Raises `UserError` without pairs."""
    reward, scorer = next(iter(scorers.items()))
    couples = couple_images(table, votes, reward, args)
    if not couples:
        raise UserError(f"--pairs_path {args.pairs_path} stays unwritten: of no prompt do two images differ.")
    low, high = scorer.source["label_range"] or (table[reward].agg(["min", "max"]) / scorer.reward.scale)

    def as_pair(couple):
        pair = {"caption": couple[0]["prompt"], "ranking_id": "-".join(line["uid"][:16] for line in couple)}
        for i, line in enumerate(couple):
            pair |= {f"jpg_{i}": (Path(args.output_dir) / line["image"]).read_bytes(), f"image_{i}_uid": line["uid"]}
            pair |= {f"{name}_{i}": line[name] for name in ("label", "model", "seed")}
            pair |= {f"score_{i}_{name}": line[name] for name in scorers}
        if not args.votes:
            gap = (couple[0][reward] - couple[1][reward]) / scorer.reward.scale
            pair["soft_label_0"] = 1 / (1 + math.exp(-gap / (high - low))) if gap else 0.5
        return pair

    def write(file):
        schema = pa.Table.from_pylist([as_pair(couples[0])]).schema
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(couples), PAIRS_ROW_GROUP):
                pairs = [as_pair(couple) for couple in couples[start : start + PAIRS_ROW_GROUP]]
                writer.write_table(pa.Table.from_pylist(pairs, schema))

    write_whole(Path(args.pairs_path), write)


# ---- The run --------------------------------------------------------------------------------------------------------


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=MERGE_TIMEOUT)
    args.dtype = args.dtype or ("float32" if state.device.type == "cpu" else "float16")
    group_of = load_prompts(args)
    (sources,) = broadcast_object_list([locate_models(args)])  # the same commits and times in all processes
    jobs = list_jobs(sources, group_of, args)
    votes = read_votes(jobs, args)
    kept = kept_scores(args)
    try:
        scorers = load_scorers(state.device, args)  # before anything is drawn: they may not be there
        for name in sources:
            own = [job for job in jobs[state.process_index :: state.num_processes] if job.model == name]
            draw_images(own, sources, args)
            score_missing(own, f"Scores of {name}", kept, scorers, args)
    except torch.OutOfMemoryError as error:
        advice = "give less, or fewer rewards, and start the same command again, which keeps all that is drawn"
        raise UserError(f"--batch_size {args.batch_size} does not fit into memory: {advice}. {error}") from error
    state.wait_for_everyone()
    if state.is_main_process:
        if lost := [job.image for job in jobs if not (Path(args.output_dir) / job.image).exists()]:
            raise UserError(f"--output_dir {args.output_dir} lacks {lost[0]}: machines have to share the folder.")
        kept = kept_scores(args)
        score_missing(jobs, "Scores", kept, scorers, args)  # what a file of another machine does not show yet
        scores = {reward: [kept[score_key(job, scorer, args)] for job in jobs] for reward, scorer in scorers.items()}
        table = pd.DataFrame(jobs).assign(**scores)
        record = write_results(table, votes, sources, scorers, args)
        if args.blind:
            write_blind(table, args)
        if args.report_to != "none":
            with explain_errors("report_to", args.report_to, "a tracker that is installed and logged in"):
                send_results(record, args)
        if args.pairs_path is not None:  # last, as the same command refuses to write over it
            write_pairs(table, votes, scorers, args)
        print(f"\nImages, scores and pictures are in {args.output_dir}: look at its gallery.html.")


if __name__ == "__main__":
    with short_errors():
        main(ARGS)
