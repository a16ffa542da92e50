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
or of other CLIP-style models, and what else is asked for. A model's win rate over another is the share of images with
the higher reward than the other's at the same prompt and seed, a tie counting a half. All intervals are of 95 % and
over prompts, as the images of one are not independent. With several files of prompts, or a --group_column, all of it
is also said of each group. With --run_dir every checkpoint of a training run is a model, and the best is named.

    images/NAME/PROMPT_IMAGE.png   the images
    scores/NAME.json               their rewards, so that nothing is scored twice
    scores.csv                     one line an image
    results.csv, .json, .md        medians, means, win rates of every model over every other, and the best checkpoint
    comparison-NAME.png            base beside tuned, for prompts from the largest gain to the largest loss
    gaps.png, checkpoints.png      how tuned less base is distributed; win rate over training steps, with --run_dir

The same command, started again, draws and scores only what is not there yet. With `accelerate launch` several
processes share the work; machines have to share the folder.
"""

import argparse
import hashlib
import html
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from datasets import DatasetDict, load_dataset_builder, load_from_disk
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import check_min_version


check_min_version("0.35.0")

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore was tuned from this CLIP
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"  # whose embeddings LAION's aesthetic head takes
# The numbers of the linear layers in the linearMSE predictors, dropout between; others have ReLUs and other numbers.
AESTHETIC_LAYERS = [0, 2, 4, 6, 7]
# Pillow resizes, on every machine: torchvision, where it is installed, gives other pixels. transformers 4: `use_fast`.
PIL_BACKEND = (
    {"backend": "pil"} if importlib.util.find_spec("transformers.image_processing_backends") else {"use_fast": False}
)
DATASET_ACCEPTED = "a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder"
PROMPTS_ACCEPTED = "UTF-8: txt with a prompt a line, a json list of prompts, or json, csv, tsv or Parquet with columns"
MODELS_ACCEPTED = "a pipeline, UNet, training checkpoint or LoRA, each a folder or a Hub name, or a LoRA file"
PROMPT_FILES = (".txt", ".json", ".csv", ".tsv", ".parquet")
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
ENDS = [0.025, 0.975]  # of a 95 % interval, as quantiles
NUM_RESAMPLES = 10_000  # of the bootstrap
NUM_HALVES = 1_000  # ways to split the prompts into two halves
FEW_PROMPTS = 20  # below them no interval means much
NUM_COMPARED_PROMPTS = 12
THUMBNAIL = 256  # width in pixels of an image in a picture of many
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of a cell, for a spreadsheet
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
    """How often each of P prompts comes up in each of `NUM_RESAMPLES` draws of P prompts, `[NUM_RESAMPLES, P]`.

    >>> counts = resample_prompts(5, seed=0)
    >>> counts.shape, bool((counts.sum(axis=1) == 5).all())
    ((10000, 5), True)
    """
    counts = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), NUM_RESAMPLES)
    return counts.astype(np.float32)  # whole numbers, for a fast matrix product


def win_intervals(rates, counts):
    """Ends `[2, D]` of the intervals of D mean win rates, from those at P prompts `[P, D]` and `resample_prompts`.

    Wilson's (1927) where every prompt is wholly won or wholly lost; else the percentile bootstrap's, which would give
    100 % to 100 % where all are won.

    >>> won = np.repeat([[1.0, 0.5], [0.0, 1.0]], 50, axis=0)
    >>> win_intervals(won, resample_prompts(100, seed=0)).round(3).tolist()
    [[0.404, 0.7], [0.596, 0.8]]
    """
    count, means, z = len(rates), rates.mean(axis=0), NormalDist().inv_cdf(0.975)
    resampled = np.quantile(counts @ rates.astype(np.float32) / count, ENDS, axis=0)
    half = z * np.sqrt(means * (1 - means) / count + z**2 / (4 * count**2))
    wilson = (means + z**2 / (2 * count) + np.stack([-half, half])) / (1 + z**2 / count)
    return np.where(np.isin(rates, [0, 1]).all(axis=0), wilson.clip(0, 1), resampled)


def resampled_medians(values, counts):
    """Median over all images of `values` `[P, images]` in each resample of the prompts, `[NUM_RESAMPLES]`.

    >>> counts = np.array([[1, 1, 1], [0, 0, 3], [2, 1, 0]])
    >>> resampled_medians(np.array([[1.0], [2.0], [4.0]]), counts).tolist()
    [2.0, 4.0, 1.0]
    """
    order, medians = np.argsort(values, axis=None), []
    ordered, prompts = values.ravel()[order], order // values.shape[1]
    for some in np.array_split(counts, 10):  # for memory's sake
        seen = some[:, prompts].cumsum(axis=1)
        middle = [(seen <= place).sum(axis=1) for place in ((values.size - 1) // 2, values.size // 2)]
        medians.append(ordered[middle].mean(axis=0))
    return np.concatenate(medians)


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


def summarise(scores, groups, seed):
    """Medians and means of every model, and its win rates over every other one.

    Args:
        scores: `{reward: {model: float array [prompts, images]}}`, the base first.
        groups: the group of each prompt, or None for each.
        seed: of the bootstrap.

    Returns:
        Dicts with `reward`, `group`, `model`, `num_prompts`, `mean`, `median` and `median_less_base`, and dicts with
        `reward`, `group`, `model`, `opponent`, `win_rate` and `tie_rate`. Medians, their differences and win rates
        have intervals, from `..._low` to `..._high`. Groups are `ALL` and, if there are several, each.

    >>> base, tuned = np.array([[20.0], [21.0], [22.0]]), np.array([[21.0], [23.0], [22.0]])
    >>> results, duels = summarise({"pick": {"base": base, "tuned": tuned}}, [None] * 3, seed=0)
    >>> results[1]["model"], results[1]["median"], results[1]["median_less_base"]
    ('tuned', 22.0, 1.0)
    >>> print("{model} {win_rate:.3f} {tie_rate:.3f}".format(**duels[1]))
    tuned 0.833 0.333
    """

    def with_interval(name, value, ends):
        return {name: float(value), f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}

    chosen = {ALL: np.ones(len(groups), dtype=bool)}
    names = [group for group in dict.fromkeys(groups) if group not in (None, ALL)]
    if len(names) > 1:  # a single group is all
        chosen |= {name: np.array([group == name for group in groups]) for name in names}
    results, duels = [], []
    for (reward, of_model), (group, prompts) in itertools.product(scores.items(), chosen.items()):
        key, models = {"reward": reward, "group": group}, list(of_model)
        values = np.stack([of_model[model][prompts] for model in models])  # [M, P, images]
        counts = resample_prompts(values.shape[1], seed)
        medians, resampled = np.median(values, axis=(1, 2)), [resampled_medians(each, counts) for each in values]
        for i, model in enumerate(models):
            row = {**key, "model": model, "num_prompts": values.shape[1], "mean": float(values[i].mean())}
            row |= with_interval("median", medians[i], np.quantile(resampled[i], ENDS))
            ends = np.quantile(resampled[i] - resampled[0], ENDS)
            results.append(row | with_interval("median_less_base", medians[i] - medians[0], ends))
        first, second = np.nonzero(~np.eye(len(models), dtype=bool))  # every ordered pair, [D]
        rates = wins(values[first], values[second]).mean(axis=2).T  # [P, D]
        ties = (values[first] == values[second]).mean(axis=(1, 2))
        for i, j, rate, ends, tie in zip(first, second, rates.mean(axis=0), win_intervals(rates, counts).T, ties):
            duel = {**key, "model": models[i], "opponent": models[j], "tie_rate": float(tie)}
            duels.append(duel | with_interval("win_rate", rate, ends))
    return results, duels


# ---- Prompts --------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user's; its text says what was found, what is accepted, and what to do."""


@contextmanager
def explain_errors(flag, value, accepted="a Hub name or a folder"):
    """Turns a library's complaint about what a flag names into a `UserError` with the flag and what it accepts."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a dozen types on damaged files
        reason = f"{error} ({error.__cause__})" if error.__cause__ else error
        raise UserError(f"--{flag} {value} cannot be loaded: {reason}\nAccepted: {accepted}.") from error


def pick_columns(names, args):
    """The columns of prompts and, with --group_column, of groups, among those that there are."""
    other = next((name for name in ("prompt", "Prompt") if name in names), args.caption_column)  # as in Parti-Prompts
    columns = [args.caption_column if args.caption_column in names else other]
    columns += [args.group_column] if args.group_column is not None else []
    for flag, column in zip(("caption_column", "group_column"), columns):
        if column not in names:
            raise UserError(f"It has no column for --{flag} {column}, but {', '.join(names)}.")
    return columns


def read_prompts(path, args):
    """Yields the prompts in a file of --prompts_path, or tuples of prompt and group."""
    suffix = Path(path).suffix
    with explain_errors("prompts_path", path, PROMPTS_ACCEPTED):
        if suffix == ".parquet":
            table = pq.read_table(path, columns=pick_columns(pq.read_schema(path).names, args)).to_pandas()
        elif suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        else:
            text = Path(path).read_text(encoding="utf-8-sig")
            rows = json.loads(text) if suffix == ".json" else text.splitlines()
            if not isinstance(rows, list) or {type(row) for row in rows} not in ({str}, {dict}, set()):
                raise ValueError("it holds no list of prompts or of rows")
            plain = not rows or isinstance(rows[0], str)
            table = pd.DataFrame({args.caption_column: rows} if plain else rows)
        return table[pick_columns(table.columns, args)].astype(object).itertuples(index=False)


def read_data_set(args):
    """Yields tuples of prompt and, with --group_column, group of --dataset_name; no other split or column is read."""
    name, split = args.dataset_name, args.dataset_split_name
    with explain_errors("dataset_name", f"{name} --dataset_split_name {split}", DATASET_ACCEPTED):
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            data = load_from_disk(name)
            if isinstance(data, DatasetDict) and split not in data:
                raise ValueError(f"it has the splits {', '.join(data)}")
            data = data[split] if isinstance(data, DatasetDict) else data
            columns = pick_columns(data.column_names, args)
        else:
            source = {"path": name, "name": args.dataset_config_name}
            if name.endswith(".parquet"):
                source = {"path": "parquet", "data_files": {split: name}}
            builder = load_dataset_builder(**source)
            data = builder.as_streaming_dataset(split)
            columns = pick_columns(data.column_names or list(next(iter(data))), args)
            if builder.name == "parquet":  # the others read whole rows
                data = load_dataset_builder(**source, columns=columns).as_streaming_dataset(split)
        for row in data.select_columns(columns):
            yield tuple(row[column] for column in columns)


def load_prompts(args):
    """The different prompts, in the order of first occurrence, and the group of each, or None; raises `UserError`."""
    group_of, paths = {}, args.prompts_path or [None]
    for path in paths:
        of_file = Path(path).stem if len(paths) > 1 and args.group_column is None else None
        for prompt, *group in read_prompts(path, args) if path else read_data_set(args):
            if prompt is None or isinstance(prompt, float) and math.isnan(prompt):
                continue
            if not isinstance(prompt, str):
                raise UserError(f"--caption_column {args.caption_column} holds {repr(prompt)[:80]}, which is no text.")
            if prompt.strip():
                group_of.setdefault(prompt.strip(), str(*group) if group else of_file)
            if len(group_of) == args.max_prompts:
                return list(group_of), list(group_of.values())
    if not group_of:
        raise UserError(f"There are no prompts in {' '.join(args.prompts_path or [args.dataset_name])}: all is empty.")
    return list(group_of), list(group_of.values())


# ---- Models and images ----------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A model as it is now: a local file or folder, or a commit of a Hub repository."""

    path: str
    commit: str | None  # None where it is local
    files: list  # their names, relative to the folder
    identity: str  # the commit, or a hash of the files' names, sizes and times

    @property
    def kind(self):
        """One of "pipeline", "unet", "lora", with its subfolder or file; (None, None) if it is none of them."""
        if LORA_FILE in self.files:
            return "lora", LORA_FILE
        if "model_index.json" in self.files:
            return "pipeline", None
        if "config.json" in self.files or "unet/config.json" in self.files:
            return "unet", None if "config.json" in self.files else "unet"
        weights = [file for file in self.files if re.fullmatch(r"[^/]+\.safetensors", file)]
        return ("lora", weights[0]) if len(weights) == 1 else (None, None)


def digest(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def locate(flag, path, revision=None):
    """The `Source` that a flag names, of which nothing is downloaded; raises `UserError` if there is none."""
    local = Path(path)
    if local.exists():
        root = local if local.is_dir() else local.parent
        files = sorted(file for file in root.rglob("*") if file.is_file()) if local.is_dir() else [local]
        facts = [[file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        # What a run has ended with is known without its checkpoints, which may be deleted.
        lasting = [fact for fact in facts if not re.match(r"(partial-)?checkpoint-\d+/", fact[0])]
        return Source(path, None, [name for name, *_ in facts], f"{path} {digest(lasting)}")
    with explain_errors(flag, path, "a file or folder that exists, or the name of a Hub repository"):
        try:
            found = HfApi().model_info(path, revision=revision)
            commit, names = found.sha, [file.rfilename for file in found.siblings]
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # requests and httpx have errors of their own for a missing network: what is cached will do
            folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
            commit, names = folder.name, [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    return Source(path, commit, names, f"{path}@{commit}")


def locate_models(args):
    """The `Source` of base and tuned models by name; raises `UserError` if one is not there or of no accepted kind."""
    base = args.pretrained_model_name_or_path
    sources = {"base": locate("pretrained_model_name_or_path", base, args.revision)}
    if sources["base"].kind[0] != "pipeline":
        raise UserError(
            f"--pretrained_model_name_or_path {base} is no pipeline: it has no model_index.json. Of a single file,"
            " make a folder: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), of SDXL with"
            " StableDiffusionXLPipeline."
        )
    for name, path in args.models.items():
        sources[name] = locate("models", path)
        if sources[name].kind[0] is None:
            listed = ", ".join(sorted(sources[name].files)[:12]) or "nothing"
            raise UserError(f"--models {name}={path} holds {listed}.\nAccepted: {MODELS_ACCEPTED}.")
    return sources


def load_pipeline(source, base, device, args):
    """The pipeline of a model, on top of the base if it is none itself; raises `UserError` if it cannot be loaded."""
    (kind, part), dtype = source.kind, getattr(torch, args.dtype)
    whole = source if kind == "pipeline" else base
    flag, variant = ("pretrained_model_name_or_path", args.variant) if whole is base else ("models", None)
    with explain_errors(flag, whole.path):
        pipeline = DiffusionPipeline.from_pretrained(
            whole.path, revision=whole.commit, variant=variant, safety_checker=None, torch_dtype=dtype
        )
    with explain_errors("models", source.path, MODELS_ACCEPTED):
        try:
            if kind == "lora":
                folder = os.path.dirname(source.path) if os.path.isfile(source.path) else source.path
                pipeline.load_lora_weights(folder or ".", weight_name=part, revision=source.commit)
            elif kind == "unet":
                options = {"subfolder": part, "revision": source.commit, "torch_dtype": dtype}
                pipeline.unet = UNet2DConditionModel.from_pretrained(source.path, **options)
            pipeline.to(device)  # what had no weights fails here
        except Exception as error:  # safetensors, PEFT and PyTorch have errors of their own
            raise ValueError(f"{type(error).__name__}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_whole(path, save):
    """Lets `save` fill a file under another name, and renames it: who is killed leaves no half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    save(temporary)
    os.replace(temporary, path)


def save_text(path, text):
    save_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def open_output(prompts, sources, args):
    """Makes the output folder; raises `UserError` if the images in it are of other prompts, settings or models."""
    folder = Path(args.output_dir)
    path = folder / "evaluation_args.json"
    names = "num_images_per_prompt num_inference_steps guidance_scale resolution seed dtype variant".split()
    record = {f"--{name}": getattr(args, name) for name in names} | {"prompts": digest(prompts)}
    record |= {f"model {name}": source.identity for name, source in sources.items()}
    if PartialState().is_main_process:
        saved = json.loads(path.read_text()) if path.is_file() else {}
        known = [key for key in record if key in saved]
        changes = [f"{key}: {saved[key]} then, {record[key]} now" for key in known if saved[key] != record[key]]
        if changes:
            changes = [f"--output_dir {folder} holds images of something else:", *changes]
            raise UserError("\n".join([*changes, "Give another folder, or delete this one."]))
        folder.mkdir(parents=True, exist_ok=True)
        save_text(path, json.dumps({**saved, **record}, indent=2))
    PartialState().wait_for_everyone()


def image_path(name, prompt, i, args):
    return Path(args.output_dir) / "images" / name / f"{prompt:05d}_{i}.png"


def image_seed(prompt, i, args):
    return args.seed + prompt * args.num_images_per_prompt + i


def draw_images(name, sources, prompts, args):
    """Draws every prompt with every seed and saves the images, this process's share, which are not there yet."""
    state = PartialState()
    jobs = list(np.ndindex(len(prompts), args.num_images_per_prompt))[state.process_index :: state.num_processes]
    missing = [job for job in jobs if not image_path(name, *job, args).exists()]
    if not missing:
        return
    pipeline = load_pipeline(sources[name], sources["base"], state.device, args)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    options |= {"height": args.resolution, "width": args.resolution}
    image_path(name, 0, 0, args).parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(missing), desc=f"Images of {name}", unit="image", disable=not state.is_local_main_process)
    for start in range(0, len(missing), args.batch_size):
        batch = missing[start : start + args.batch_size]
        # On the CPU, so that an image does not depend on the device or on the batch it is drawn in.
        generators = [torch.Generator().manual_seed(image_seed(*job, args)) for job in batch]
        images = pipeline([prompts[prompt] for prompt, _ in batch], generator=generators, **options).images
        for job, image in zip(batch, images):
            save_whole(image_path(name, *job, args), lambda temporary: image.save(temporary, "png"))
        bar.update(len(batch))
    bar.close()


# ---- Rewards --------------------------------------------------------------------------------------------------------


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


class Scorer(NamedTuple):
    """A CLIP-style model, frozen and on its device, and LAION's head where that makes the score."""

    model: torch.nn.Module
    processor: Any
    head: torch.nn.Module | None
    record: dict  # what tells its scores from another's

    @torch.no_grad()
    def score(self, images, texts, pool):
        """Scores of N images: 100 times the cosines with their texts, or what the head says. Float64 `[N]`."""
        prepared = pool.map(lambda image: self.processor.image_processor(image, return_tensors="pt"), images)
        embeddings = embed_images(self.model, torch.cat([inputs["pixel_values"] for inputs in prepared]))
        if self.head is not None:
            return self.head(embeddings)[:, 0].double().cpu().numpy()
        return 100 * (embeddings * embed_texts(self.model, self.processor, texts)).sum(-1).double().cpu().numpy()


def load_aesthetic_head(path):
    """LAION's linear layers from an image embedding to a number; raises `UserError` if the file holds no such layers.

    https://github.com/christophschuhmann/improved-aesthetic-predictor. The dropout between them does nothing here.
    """
    numbers = ", ".join(map(str, AESTHETIC_LAYERS))
    accepted = f"weights and biases of layers.N, N of {numbers}: the linearMSE predictors"
    with explain_errors("aesthetic_head", path, accepted):
        try:
            weights = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # safetensors and pickle have errors of their own
            raise ValueError(f"it is no file of tensors ({type(error).__name__})") from error
        if set(weights) != {f"layers.{number}.{part}" for number in AESTHETIC_LAYERS for part in ("weight", "bias")}:
            raise ValueError(f"it holds {', '.join(list(weights)[:12])}")
    layers = []
    for number in AESTHETIC_LAYERS:
        layers.append(torch.nn.Linear(*reversed(weights[f"layers.{number}.weight"].shape)))
        layers[-1].load_state_dict({part: weights[f"layers.{number}.{part}"] for part in ("weight", "bias")})
    return torch.nn.Sequential(*layers).requires_grad_(False)


def load_scorer(flag, path, revision, processor_path, device, args, head=None):
    """The `Scorer` of what a flag names; raises `UserError` if it does not embed images and texts into one space."""
    source = locate(flag, path, revision)
    own = processor_path == path
    of_processor = source if own else locate("reward_processor", processor_path)
    with explain_errors(flag, path):
        try:
            model = AutoModel.from_pretrained(path, revision=source.commit)
        except Exception as error:  # safetensors and PyTorch have errors of their own
            raise ValueError(f"{type(error).__name__}: {error}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UserError(f"--{flag} {path} is a {type(model).__name__}, not a CLIP-style model.")
    with explain_errors(flag if own else "reward_processor", processor_path):
        processor = AutoProcessor.from_pretrained(processor_path, revision=of_processor.commit)
        pixels = AutoImageProcessor.from_pretrained(processor_path, revision=of_processor.commit, **PIL_BACKEND)
    processor.image_processor = pixels
    record = {"model": source.identity, "processor": of_processor.identity, "dtype": args.dtype}
    record["image_processor"] = {"class": type(pixels).__name__, **pixels.to_dict()}
    model = model.requires_grad_(False).eval().to(device, getattr(torch, args.dtype))
    return Scorer(model, processor, head, record)


def load_scorers(device, args):
    """What scores, `{reward: Scorer}`."""
    sources = zip(args.reward_model.items(), args.reward_model_revision, args.reward_processor)
    scorers = {name: load_scorer("reward_model", path, *rest, device, args) for (name, path), *rest in sources}
    if args.aesthetic_head is not None:
        head, clip = load_aesthetic_head(args.aesthetic_head).to(device), args.aesthetic_clip
        scorers["aesthetic"] = load_scorer("aesthetic_clip", clip, None, clip, device, args, head)
        scorers["aesthetic"].record["head"] = locate("aesthetic_head", args.aesthetic_head).identity
    return scorers


def score_files(paths, texts, scorers, batch_size):
    """Rewards of N image files for their texts, `{reward: float64 array [N]}`."""
    scores = {name: np.empty(len(paths)) for name in scorers}
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without holding up the others
        for start in range(0, len(paths), batch_size):
            batch = slice(start, start + batch_size)
            images = list(pool.map(lambda path: Image.open(path).convert("RGB"), paths[batch]))
            for name, scorer in scorers.items():
                scores[name][batch] = scorer.score(images, texts[batch], pool)
    return scores


def score_models(models, prompts, scorers, args):
    """Rewards `{reward: {model: float array [prompts, images]}}`, in the main process; every process scores a share.

    What was scored before of the same images, prompts and reward is read from scores/NAME.json. Raises `UserError` if
    a score is not finite.
    """
    state, scores = PartialState(), {reward: {} for reward in scorers}
    jobs = list(np.ndindex(len(prompts), args.num_images_per_prompt))
    texts, share = [prompts[prompt] for prompt, _ in jobs], slice(state.process_index, None, state.num_processes)
    for name in tqdm(models, desc="Scores", unit="model", disable=not state.is_main_process):
        paths = [image_path(name, *job, args) for job in jobs]
        facts = [texts, [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]]
        keys = {reward: digest([scorer.record, facts]) for reward, scorer in scorers.items()}
        kept_path = Path(args.output_dir) / "scores" / f"{name}.json"
        kept = json.loads(kept_path.read_text()) if kept_path.is_file() else {}
        missing = [reward for reward in keys if kept.get(reward, {}).get("key") != keys[reward]]
        (missing,) = broadcast_object_list([missing])  # the main process's, as all have to do the same
        if missing:
            some = {reward: scorers[reward] for reward in missing}
            of_process = gather_object([score_files(paths[share], texts[share], some, args.batch_size)])
        if not state.is_main_process:
            continue
        for reward in missing:
            values = np.empty(len(jobs))
            for i, found in enumerate(of_process):
                values[i :: state.num_processes] = found[reward]
            for i in np.flatnonzero(~np.isfinite(values)):
                raise UserError(
                    f"{reward} gives {values[i]} to {paths[i]} ({texts[i]!r}), which ranks nothing. Either the reward"
                    " model is damaged, or it overflows in float16: give --dtype float32 and another --output_dir."
                )
            kept[reward] = {"key": keys[reward], "scores": values.tolist()}
        if missing:
            kept_path.parent.mkdir(exist_ok=True)
            save_text(kept_path, json.dumps(kept))
        for reward in scorers:
            scores[reward][name] = np.reshape(kept[reward]["scores"], (len(prompts), -1))
    return scores


# ---- Pictures and tables --------------------------------------------------------------------------------------------


def side_by_side(base_images, tuned_images, prompts):
    """One picture: a row a prompt with its text above, each base image left of the tuned one at the same seed.

    `base_images` and `tuned_images` are a list of images for each prompt, all of one size; they are shown
    `THUMBNAIL` pixels wide.
    """
    width = THUMBNAIL
    height = width * base_images[0][0].height // base_images[0][0].width
    columns = 2 * len(base_images[0])
    texts = [textwrap.fill(f"base | tuned: {prompt}", columns * width // 6) for prompt in prompts]  # 6 pixels a letter
    text_height = 8 + 15 * max(text.count("\n") + 1 for text in texts)
    sheet = Image.new("RGB", (columns * width, len(prompts) * (height + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (text, *images) in enumerate(zip(texts, base_images, tuned_images)):
        top = row * (height + text_height)
        draw.multiline_text((4, top + 4), text, fill="black", font_size=10)
        for column, image in enumerate(image for pair in zip(*images) for image in pair):
            sheet.paste(image.resize((width, height)), (column * width, top + text_height))
    return sheet


def compare(name, gaps, prompts, args):
    """`side_by_side` of prompts evenly spaced from the largest to the smallest of their mean `gaps` `[prompts]`."""
    order = np.argsort(-gaps, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(NUM_COMPARED_PROMPTS, len(order))).round().astype(int)]
    images = [
        [[Image.open(image_path(model, p, i, args)) for i in range(args.num_images_per_prompt)] for p in chosen]
        for model in ("base", name)
    ]
    return side_by_side(*images, [f"{prompts[prompt]} ({gaps[prompt]:+.2f})" for prompt in chosen])


def draw_gaps(scores):
    """Histograms of score less the base's, a panel a reward, a line a model."""
    figure = Figure(figsize=(6 * len(scores), 4), layout="constrained")
    for axes, (reward, of_model) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        gaps = {model: (values - of_model["base"]).ravel() for model, values in of_model.items() if model != "base"}
        axes.hist(list(gaps.values()), bins=60, histtype="step", label=list(gaps))
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set(title=reward, xlabel="score less the base's", ylabel="images")
        axes.legend()
    return figure


def draw_checkpoints(duels, steps):
    """Win rate over the base by training step, with its interval, a line a reward."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    frame = pd.DataFrame(duels).query("group == @ALL and opponent == 'base' and model in @steps")
    for reward, rows in frame.groupby("reward", sort=False):
        of_checkpoint = rows["model"].map(steps)
        axes.plot(of_checkpoint, rows["win_rate"], marker="o", label=reward)
        axes.fill_between(of_checkpoint, rows["win_rate_low"], rows["win_rate_high"], alpha=0.2)
    axes.axhline(0.5, color="black", linewidth=0.5)
    axes.set(xlabel="training step", ylabel="win rate over base, 95 % interval", ylim=(0, 1))
    axes.legend()
    return figure


def escape_markdown(text):
    r"""A text so that Markdown, and the HTML in it, shows it as it is, `a|b <i>` as `a\|b &lt;i&gt;`."""
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def with_ends(row, name, form):
    """A number of `summarise` and its interval as a text."""
    return f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"


def as_markdown(results, duels):
    """What `summarise` returns as Markdown: a table for each reward and group, and all against all of many models."""
    lines, models = [], list(dict.fromkeys(row["model"] for row in results))
    duel_of = {(row["reward"], row["group"], row["model"], row["opponent"]): row for row in duels}
    for reward, group in dict.fromkeys((row["reward"], row["group"]) for row in results):
        rows = [row for row in results if (row["reward"], row["group"]) == (reward, group)]
        few = ", too few prompts for an interval to mean much" * (rows[0]["num_prompts"] < FEW_PROMPTS)
        lines += [
            f"**{reward}**, {escape_markdown(group)} prompts ({rows[0]['num_prompts']}{few}), 95 % intervals",
            "",
        ]
        lines += ["| model | median score | less the base's | mean score | win rate over base | ties |"]
        lines += ["|---" * 6 + "|"]
        for row in rows:
            cells = [row["model"], with_ends(row, "median", ".3f"), "", f"{row['mean']:.3f}", "", ""]
            if row["model"] != models[0]:
                duel = duel_of[reward, group, row["model"], models[0]]
                cells[2] = with_ends(row, "median_less_base", "+.3f")
                cells[4:] = [with_ends(duel, "win_rate", ".1%"), f"{duel['tie_rate']:.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        if len(models) > 2 and group == ALL:
            lines += [f"| {reward}, win rate over | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
            for model in models:
                found = [duel_of.get((reward, group, model, opponent)) for opponent in models]
                cells = [with_ends(duel, "win_rate", ".1%") if duel else "" for duel in found]
                lines.append(f"| {model} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def name_best(scores, duels, args):
    """The checkpoint that wins most often over the base under the first reward: its row, and a sentence on it."""
    (reward, of_model), steps = next(iter(scores.items())), args.steps
    key = {"reward": reward, "group": ALL, "opponent": "base"}.items()
    rows = [row for row in duels if key <= row.items() and row["model"] in steps]
    best = max(rows, key=lambda row: row["win_rate"])
    rates = np.stack([wins(of_model[name], of_model["base"]).mean(axis=1) for name in steps], axis=1)
    honest = win_rate_on_other_half(rates, args.seed)
    text = (
        f"**{best['model']}** is the best of {len(steps)} checkpoints under {reward}: it wins over the base"
        f" {with_ends(best, 'win_rate', '.1%')}. To pick the best of many and to measure it on the same prompts is"
        f" optimistic: picked on one half of the prompts, the best wins {honest:.1%} on the other half."
    )
    return {**best, "step": steps[best["model"]], "win_rate_on_other_half": honest}, text


def write_csv(path, rows):
    """A table of dicts; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    table = pd.DataFrame(rows, dtype=object).map(
        lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
    )
    save_text(path, table.to_csv(index=False))


def write_results(scores, prompts, groups, sources, scorers, args):
    """Writes the tables and pictures, and returns the Markdown."""
    folder, rows = Path(args.output_dir), []
    for name, (prompt, i) in itertools.product(sources, np.ndindex(len(prompts), args.num_images_per_prompt)):
        row = {"model": name, "prompt": prompts[prompt], "group": groups[prompt], "seed": image_seed(prompt, i, args)}
        row |= {reward: of_model[name][prompt, i] for reward, of_model in scores.items()}
        rows.append(row | {"image": image_path(name, prompt, i, args).relative_to(folder).as_posix()})
    write_csv(folder / "scores.csv", rows)
    results, duels = summarise(scores, groups, args.seed)
    write_csv(folder / "results.csv", results + duels)
    record, text = {"results": results, "win_rates": duels}, as_markdown(results, duels)
    if args.steps:
        record["best"], sentence = name_best(scores, duels, args)
        text = f"{sentence}\n\n{text}"
        draw_checkpoints(duels, args.steps).savefig(folder / "checkpoints.png", dpi=120)
    record["models"] = {name: source.identity for name, source in sources.items()}
    record["rewards"] = {reward: scorer.record for reward, scorer in scorers.items()}
    save_text(folder / "results.json", json.dumps({**record, "args": vars(args)}, indent=2))
    save_text(folder / "results.md", text)
    draw_gaps(scores).savefig(folder / "gaps.png", dpi=120)
    first_reward = next(iter(scores.values()))
    for name in args.models:
        gaps = (first_reward[name] - first_reward["base"]).mean(axis=1)
        compare(name, gaps, prompts, args).save(folder / f"comparison-{name}.png")
    return text


# ---- Command line ---------------------------------------------------------------------------------------------------


def positive_int(text):
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Medians and win rates, base against tuned.")

    group = parser.add_argument_group("models", "Give --models, --run_dir, or both.")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Base model: a Hub name or a folder.")
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help='Variant of the base model\'s weight files, for example "fp16".')
    group.add_argument(
        "--models", nargs="+", default=[], help=f"Tuned models, each PATH or NAME=PATH: {MODELS_ACCEPTED}."
    )
    group.add_argument("--run_dir", help="Output folder of a training run: compares its checkpoints, names the best.")

    group = parser.add_argument_group("prompts", "Give one of --prompts_path and --dataset_name.")
    group.add_argument(
        "--prompts_path", nargs="+", help=f"Files of prompts, each a group if there are several: {PROMPTS_ACCEPTED}."
    )
    group.add_argument("--dataset_name", help=f"Data set: {DATASET_ACCEPTED}.")
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", "--split", default="train", help="Split of the data set.")
    group.add_argument("--caption_column", default="caption", help="Prompt of the images.")
    group.add_argument("--group_column", help="What results are broken down by, such as Category of Parti-Prompts.")
    group.add_argument("--max_prompts", type=positive_int, help="Use the first so many prompts.")

    group = parser.add_argument_group("sampling")
    group.add_argument("--num_images_per_prompt", type=positive_int, default=1, help="Images, each with its own seed.")
    group.add_argument("--num_inference_steps", type=positive_int, default=50, help="Denoising steps.")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="Classifier-free guidance.")
    group.add_argument("--resolution", type=positive_int, default=512, help="Side of the square images, in pixels.")
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
    group.add_argument("--aesthetic_head", help="Weights of LAION's sac+logos+ava1-l14-linearMSE.pth, also a reward.")
    group.add_argument("--aesthetic_clip", default=AESTHETIC_CLIP, help="CLIP that --aesthetic_head goes on top of.")

    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Precision of the models. Default: float16 on an accelerator, float32 on a CPU.",
    )
    group.add_argument("--batch_size", type=positive_int, default=16, help="Images at a time.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="Folder for images, scores and tables.")

    args = parser.parse_args(input_args)
    resolve(args)
    return args


def named_sources(values, flag, taken, problems):
    """`{name: path}` of a flag's values, PATH or NAME=PATH; what is wrong with them is added to the problems."""
    sources = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or "/" in name:  # a path may have an = of its own
            name, path = Path(value).name.removesuffix(".safetensors"), value
        if not re.fullmatch(r"[\w.-]+", name) or name in taken or name in sources:
            problems.append(
                f"--{flag} {value}: {name!r} cannot name it, as it is taken or has other characters than letters,"
                " digits, '.', '_' and '-'. Give NAME=PATH."
            )
        sources[name] = path
    return sources


def resolve(args):
    """Checks what no type does, and fills in what depends on others.

    --models, with the checkpoints of --run_dir, and --reward_model become `{name: path}`; `args.steps` is
    `{checkpoint: step}`. A `~` becomes the home folder.

    Raises:
        UserError: with every problem that the flags alone show, one a line, before anything is loaded.
    """
    problems = []
    for flag in "pretrained_model_name_or_path run_dir dataset_name aesthetic_head aesthetic_clip output_dir".split():
        if getattr(args, flag) is not None:
            setattr(args, flag, os.path.expanduser(getattr(args, flag)))
    if not math.isfinite(args.guidance_scale):
        problems.append(f"--guidance_scale must be finite, got {args.guidance_scale}.")
    if args.seed < 0:
        problems.append(f"--seed must not be negative, got {args.seed}.")
    if args.resolution % 8:
        problems.append(f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}.")
    if Path(args.output_dir).is_file():
        problems.append(f"--output_dir {args.output_dir} is a file: name a folder.")
    if (args.prompts_path is None) == (args.dataset_name is None):
        problems.append("Give prompts with one of --prompts_path and --dataset_name.")
    args.prompts_path = args.prompts_path and [os.path.expanduser(path) for path in args.prompts_path]
    for path in args.prompts_path or []:
        if not Path(path).is_file():
            problems.append(f"--prompts_path {path} is not a file.")
        elif Path(path).suffix not in PROMPT_FILES:
            problems.append(f"--prompts_path {path} must end in {', '.join(PROMPT_FILES)}.")
    if args.dataset_name and Path(args.dataset_name).is_file() and not args.dataset_name.endswith(".parquet"):
        problems.append(f"--dataset_name {args.dataset_name} is a file: give it to --prompts_path.")
    args.steps = {}
    if args.run_dir is not None:
        names = [path.name for path in Path(args.run_dir).glob("checkpoint-*")]
        steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name))
        args.steps = {f"checkpoint-{step}": step for step in steps}
        if not steps:
            problems.append(f"--run_dir {args.run_dir} has no folders named checkpoint-STEP.")
    args.models = named_sources(args.models, "models", ["base", *args.steps], problems)
    args.models.update({name: f"{args.run_dir}/{name}" for name in args.steps})
    if args.run_dir is None and not args.models:
        problems.append("Give tuned models with --models, or the folder of a run with --run_dir.")
    taken = ["aesthetic"] if args.aesthetic_head is not None else []
    args.reward_model = named_sources(args.reward_model, "reward_model", taken, problems)
    for flag in ("reward_model_revision", "reward_processor"):
        count = len(getattr(args, flag) or args.reward_model)
        if count != len(args.reward_model):
            problems.append(
                f"--{flag} has {count} values for {len(args.reward_model)} reward models: give one for each."
            )
    if args.aesthetic_head is not None and not Path(args.aesthetic_head).is_file():
        problems.append(f"--aesthetic_head {args.aesthetic_head} is not a file.")
    if args.aesthetic_head is None and args.aesthetic_clip != AESTHETIC_CLIP:
        problems.append("--aesthetic_clip does nothing without --aesthetic_head.")
    if problems:
        raise UserError("\n".join(problems))

    args.models = {name: os.path.expanduser(path) for name, path in args.models.items()}
    args.reward_model = {name: os.path.expanduser(path) for name, path in args.reward_model.items()}
    own = [PICKSCORE_PROCESSOR if path == PICKSCORE else path for path in args.reward_model.values()]
    args.reward_processor = [os.path.expanduser(path) for path in args.reward_processor or own]
    args.reward_model_revision = args.reward_model_revision or [None] * len(own)


# ---- The run --------------------------------------------------------------------------------------------------------


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=MERGE_TIMEOUT)
    args.dtype = args.dtype or ("float32" if state.device.type == "cpu" else "float16")
    prompts, groups = load_prompts(args)
    sources = locate_models(args)
    open_output(prompts, sources, args)
    scorers = load_scorers(state.device, args)  # before anything is drawn: they may not be there
    for name in sources:
        draw_images(name, sources, prompts, args)
    state.wait_for_everyone()
    scores = score_models(sources, prompts, scorers, args)
    if state.is_main_process:
        print(write_results(scores, prompts, groups, sources, scorers, args))
        print(f"\nImages, scores and pictures are in {args.output_dir}.")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)  # alone, without a traceback
        sys.exit(2)
