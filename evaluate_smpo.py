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
# ]
# ///
"""Says whether a tuned model wins: medians and win rates of base against tuned, under one or several reward models.

    accelerate launch evaluate_smpo.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --models smpo=smpo-sd15 --prompts_path prompts.txt --output_dir evaluation

Every model draws every prompt with the same seeds. A model's win rate over another is the share of images with the
higher reward at the same prompt and seed, a tie counting a half; cosines, of PickScore and the like, stand times 100.
Intervals are of 95 % and over prompts, as the images of one are not independent. All of it is said of each group of
prompts, too. With --run_dir every checkpoint of a run is a model, and the best is named.

    images/NAME/PROMPT_IMAGE.png   the images; comparison-NAME.png has base beside tuned, from the largest gain to loss
    gallery.html                   all of them with their scores, to be sorted and filtered in a browser
    scores.csv                     their rewards, a line an image; scores/ keeps them, so that none is scored twice
    results.csv, .json, .md        medians, means, win rates over the base (.csv: over all), and the best checkpoint
    blind/index.html               with --blind, a page on which people vote; --votes counts them
    --pairs_path                   the images as preference pairs, labelled by the first reward, to train on

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
import shutil
import sys
import textwrap
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any, Callable, NamedTuple

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import DatasetDict, load_dataset_builder, load_from_disk
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image, ImageDraw
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import check_min_version


check_min_version("0.35.0")

# Pillow resizes, on every machine: torchvision, where it is installed, gives other pixels. transformers 4: `use_fast`.
PIL_BACKEND = (
    {"backend": "pil"} if importlib.util.find_spec("transformers.image_processing_backends") else {"use_fast": False}
)
DATASET_ACCEPTED = "a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder"
PROMPT_FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
PROMPTS_ACCEPTED = "UTF-8: txt with a prompt a line, a json list of prompts, or json, csv, tsv or Parquet with columns"
MODELS_ACCEPTED = "a pipeline, UNet, training checkpoint or LoRA, each a folder or a Hub name, or a LoRA file"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
ENDS = [0.025, 0.975]  # of a 95 % interval, as quantiles
NUM_RESAMPLES = 4_000  # of the bootstrap
NUM_HALVES = 1_000  # ways to split the prompts into two halves
FEW_PROMPTS = 20  # below them no interval means much
NUM_COMPARED_PROMPTS = 12
THUMBNAIL = 256  # width in pixels of an image in a picture of many
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of a cell, for a spreadsheet
MERGE_TIMEOUT = timedelta(days=7)  # how long a process waits at the end for a slower one
PAIRS_PER_GROUP = 64  # in a row group of Parquet
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
    drawn = np.tile(np.arange(len(values)), len(counts)).repeat(counts.astype(int).ravel()).reshape(counts.shape)
    return np.median(values[drawn].reshape(len(counts), -1), axis=1)


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


def summarise(scores, groups, seed):
    """Medians and means of every model, and its win rates over every other one.

    Args:
        scores: `{reward: {model: float array [prompts, images]}}`, the base first.
        groups: the group of each prompt, or None for each.
        seed: of the bootstrap.

    Returns:
        Dicts with `reward`, `group`, `model`, `num_prompts`, `mean`, `median` and `median_less_base`, and dicts with
        `reward`, `group`, `model`, `opponent`, `win_rate` and `tie_rate`; the groups are `ALL` and, of several, each.
        Medians, their differences and win rates have intervals, from `..._low` to `..._high`.
    """
    groups, results, duels = np.array(groups, dtype=object), [], []
    names = [group for group in dict.fromkeys(groups) if group not in (None, ALL)]
    chosen = {ALL: slice(None)} | {name: groups == name for name in names if len(names) > 1}  # a single group is all
    for (reward, of_model), (group, prompts) in itertools.product(scores.items(), chosen.items()):
        values = {model: of_image[prompts] for model, of_image in of_model.items()}  # [P, images] of each
        base, num_prompts = next(iter(values)), len(groups[prompts])
        counts = resample_prompts(num_prompts, seed)
        resampled = {model: resampled_medians(of_image, counts) for model, of_image in values.items()}
        for model, of_image in values.items():
            row = {
                "reward": reward,
                "group": group,
                "model": model,
                "num_prompts": num_prompts,
                "mean": of_image.mean(),
            }
            row |= with_interval("median", np.median(of_image), np.quantile(resampled[model], ENDS))
            less, ends = np.median(of_image) - np.median(values[base]), resampled[model] - resampled[base]
            results.append(row | with_interval("median_less_base", less, np.quantile(ends, ENDS)))
        for model, opponent in itertools.permutations(values, 2):
            won = wins(values[model], values[opponent])
            row = {"reward": reward, "group": group, "model": model, "opponent": opponent}
            ends = win_interval(won.mean(axis=1), counts)
            duels.append(row | with_interval("win_rate", won.mean(), ends) | {"tie_rate": (won == 0.5).mean()})
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
    """The columns of prompts (Parti-Prompts': "Prompt") and, with --group_column, of groups, among those there are."""
    prompt = next((name for name in (args.caption_column, "prompt", "Prompt") if name in names), args.caption_column)
    columns = {"caption_column": prompt, "group_column": args.group_column}
    for flag, column in columns.items():
        if column is not None and column not in names:
            raise ValueError(f"it has no column for --{flag} {column}, but {', '.join(names)}.")
    return [column for column in columns.values() if column is not None]


def read_prompts(path, args):
    """Tuples of the prompt and, with --group_column, the group of each row of a file of --prompts_path."""
    suffix, utf8 = Path(path).suffix, {"encoding": "utf-8-sig"}  # with or without a byte-order mark
    with explain_errors("prompts_path", path, PROMPTS_ACCEPTED):
        if suffix == ".txt":
            table = pd.DataFrame({args.caption_column: Path(path).read_text(**utf8).splitlines()})
        elif suffix == ".parquet":
            table = pd.read_parquet(path)
        elif suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, **utf8)
        else:
            table = pd.read_json(path, lines=suffix == ".jsonl", dtype=False, **utf8)
            table = table.rename(columns={0: args.caption_column})  # of a plain list
        return table[pick_columns(table.columns, args)].astype(object).itertuples(index=False)


def read_data_set(args):
    """Yields such tuples of the rows of --dataset_name; no other split and no other column is read."""
    name, split = args.dataset_name, args.dataset_split_name
    with explain_errors("dataset_name", f"{name} --dataset_split_name {split}", DATASET_ACCEPTED):
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            data = load_from_disk(name)
            data = data[split] if isinstance(data, DatasetDict) else data
            columns = pick_columns(data.column_names, args)
        else:
            source = {"path": name}
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
    """`{prompt: its group or None}`, in the order of first occurrence; raises `UserError` if there is none."""
    group_of, paths = {}, args.prompts_path or [args.dataset_name]
    for path in paths:
        of_file = Path(path).stem if len(paths) > 1 and args.group_column is None else None
        for prompt, *group in read_prompts(path, args) if args.prompts_path else read_data_set(args):
            if prompt is None or isinstance(prompt, float) and math.isnan(prompt):
                continue
            if not isinstance(prompt, str):
                raise UserError(f"--caption_column {args.caption_column} holds {repr(prompt)[:80]}, which is no text.")
            if prompt.strip():
                group_of.setdefault(prompt.strip(), str(*group) if group else of_file)
            if len(group_of) == args.max_prompts:
                return group_of
    if not group_of:
        raise UserError(f"There are no prompts in {' '.join(paths)}: all is empty.")
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
        except Exception as error:  # requests and httpx have errors of their own for a missing network
            try:
                folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
            except Exception:
                raise ValueError(f"it is not on this machine, and the Hub cannot be reached ({error})") from error
            commit, names = folder.name, [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    return Source(path, commit, names, f"{path}@{commit}")


def locate_models(args):
    """The `Source` of base and tuned models by name; raises `UserError` if one is not there or of no accepted kind."""
    base = args.pretrained_model_name_or_path
    sources = {"base": locate("pretrained_model_name_or_path", base, args.revision)}
    if sources["base"].kind[0] != "pipeline":
        raise UserError(
            f"--pretrained_model_name_or_path {base} is no pipeline: it has no model_index.json. Of a single file make"
            " a folder: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), or ...XLPipeline."
        )
    for name, path in args.models.items():
        sources[name] = locate("models", path)
        if sources[name].kind[0] is None:
            listed = ", ".join(sorted(sources[name].files)[:12]) or "nothing"
            raise UserError(f"--models {name}={path} holds {listed}.\nAccepted: {MODELS_ACCEPTED}.")
    return sources


def load_pipeline(source, base, device, args):
    """The pipeline of a model, on top of the base if it is none itself; raises `UserError` if it cannot be loaded."""
    (kind, part), dtype = source.kind, {"torch_dtype": getattr(torch, args.dtype)}
    whole = source if kind == "pipeline" else base
    parts = {"safety_checker": None, "variant": args.variant if whole is base else None, **dtype}
    with explain_errors("pretrained_model_name_or_path" if source is base else "models", source.path, MODELS_ACCEPTED):
        if kind == "unet":  # in place of the base's, which is not read
            options = {"subfolder": part, "revision": source.commit, **dtype}
            parts["unet"] = UNet2DConditionModel.from_pretrained(source.path, **options)
        pipeline = DiffusionPipeline.from_pretrained(whole.path, revision=whole.commit, **parts)
        if kind == "lora":
            folder = os.path.dirname(source.path) or "." if os.path.isfile(source.path) else source.path
            pipeline.load_lora_weights(folder, weight_name=part, revision=source.commit)
        pipeline.to(device)  # what had no weights fails here
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- Images ---------------------------------------------------------------------------------------------------------


def save_whole(path, save):
    """Lets `save` fill a file under another name, and renames it: who is killed leaves no half of it. A `UserError`
    says that it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        advice = "All before it is kept: make room, or name another folder, and start the same command again."
        raise UserError(f"{path} cannot be written ({error}). {advice}") from error


def save_text(path, text):
    save_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def open_output(prompts, sources, args):
    """Makes the output folder; raises `UserError` if the images in it are of other prompts, settings or models."""
    path = Path(args.output_dir) / "evaluation_args.json"
    names = "num_images_per_prompt num_inference_steps guidance_scale resolution seed dtype variant".split()
    record = {f"--{name}": getattr(args, name) for name in names} | {"prompts": digest(prompts)}
    record |= {f"model {name}": source.identity for name, source in sources.items()}
    if PartialState().is_main_process:
        saved = json.loads(path.read_text()) if path.is_file() else {}
        changed = [key for key in record if saved.get(key, record[key]) != record[key]]
        if changed:
            changes = "\n".join(f"{key}: {saved[key]} then, {record[key]} now" for key in changed)
            raise UserError(
                f"--output_dir {args.output_dir} holds images of something else:\n{changes}\n"
                "Give another folder, or delete this one."
            )
        save_text(path, json.dumps({**saved, **record}, indent=2))
    PartialState().wait_for_everyone()


class Job(NamedTuple):
    """An image to draw, and a line of scores.csv."""

    model: str
    prompt: str
    group: str | None
    seed: int
    image: str  # its file in the output folder


def list_jobs(sources, group_of, args):
    """The `Job` of every image: model by model, prompt by prompt, and the images of a prompt, all seeds in a row."""
    jobs, count = [], args.num_images_per_prompt
    for name, (number, (prompt, group)), i in itertools.product(sources, enumerate(group_of.items()), range(count)):
        path = f"images/{name}/{number:05d}_{i}.png"
        jobs.append(Job(name, prompt, group, args.seed + number * count + i, path))
    return jobs


def batches(jobs, description, args):
    """Yields --batch_size jobs at a time, with a progress bar in one process of each machine."""
    silent = not jobs or not PartialState().is_local_main_process
    for start in tqdm(range(0, len(jobs), args.batch_size), description, unit="batch", disable=silent):
        yield jobs[start : start + args.batch_size]


def draw_images(jobs, sources, args):
    """Draws and saves those images of one model that are not there yet."""
    folder = Path(args.output_dir)
    missing = [job for job in jobs if not (folder / job.image).exists()]
    if not missing:
        return
    name = missing[0].model
    pipeline = load_pipeline(sources[name], sources["base"], PartialState().device, args)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    options |= {"height": args.resolution, "width": args.resolution}
    for batch in batches(missing, f"Images of {name}", args):
        # On the CPU, so that an image does not depend on the device or on the batch it is drawn in.
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        images = pipeline([job.prompt for job in batch], generator=generators, **options).images
        for job, image in zip(batch, images):
            save_whole(folder / job.image, lambda temporary: image.save(temporary, "png"))


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
BLIP_VISION = BlipVisionConfig(**VIT_L, image_size=224, layer_norm_eps=1e-6)
BLIP_TEXT = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
PADDED = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}  # tokens
CLIP_H = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")  # repository and commit
CLIP_L = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
BERT = ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
PICKSCORE = ("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
HPSV2 = ("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
IMAGE_REWARD = ("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
AESTHETIC = ("trl-lib/ddpo-aesthetic-predictor", "cf4bd10345610935a80a5d3be9a3133c50f121e4")


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
    model = AutoModel.from_pretrained(**model)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"it is a {type(model).__name__}, not a CLIP-style model")
    return model, AutoImageProcessor.from_pretrained(**base, **PIL_BACKEND)


def load_hpsv2(file, model, base):
    """HPSv2 (https://arxiv.org/abs/2306.09341), open_clip's ViT-H-14, as the CLIP that `base` configures."""
    weights = torch.load(file, "cpu", weights_only=True)["state_dict"]
    weights |= {name: weights[name].T.contiguous() for name in ("visual.proj", "text_projection")}
    weights = renamed(weights, OPEN_CLIP_NAMES)
    for name in [name for name in weights if "in_proj_" in name]:
        parts = zip("qkv", weights.pop(name).chunk(3))
        weights |= {name.replace("in_proj_", f"{letter}_proj."): part for letter, part in parts}
    config = AutoConfig.from_pretrained(**base)
    return with_weights(CLIPModel, config, weights), SquareProcessor(config.vision_config.image_size, pad=True)


def load_aesthetic(file, model, base):
    """LAION's head on a CLIP, https://github.com/christophschuhmann/improved-aesthetic-predictor."""
    model = AutoModel.from_pretrained(**base)
    model.head = linear_head(torch.load(file, "cpu", weights_only=True))
    return model, SquareProcessor(model.config.vision_config.image_size)


def load_image_reward(file, model, base):
    """ImageReward (https://arxiv.org/abs/2304.05977): BLIP, and a head on its text encoder's first state."""
    parts = defaultdict(dict)
    for name, value in torch.load(file, "cpu", weights_only=True).items():
        part, _, name = name.removeprefix("blip.").partition(".")
        parts[part][name] = value
    parts["text_encoder"].pop("embeddings.position_ids", None)
    model = with_weights(BlipTextModel, BLIP_TEXT, parts["text_encoder"], add_pooling_layer=False)
    model.vision = with_weights(BlipVisionModel, BLIP_VISION, renamed(parts["visual_encoder"], BLIP_NAMES))
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
    """A kind of reward model: where the published one lies, and how it is loaded and scores."""

    model: str = ""
    revision: str = ""
    base: str = CLIP_H[0]  # has the tokenizer, and what else `model` lacks
    base_revision: str = CLIP_H[1]
    file: str = "config.json"  # of `model`, which `load` reads
    load: Callable = load_clip
    score: Callable = score_cosine
    scale: int = 100  # by which people multiply the scores
    label_range: tuple | None = None  # of the scores in published labels


REWARDS = {
    "pickscore": Reward(*PICKSCORE, *CLIP_H, label_range=(0.11543526500463486, 0.28201571106910706)),
    "hpsv2.1": Reward(*HPSV2, *CLIP_H, "HPS_v2.1_compressed.pt", load_hpsv2),
    "imagereward": Reward(*IMAGE_REWARD, *BERT, "ImageReward.pt", load_image_reward, score_image_reward, 1),
    "aesthetic": Reward(*AESTHETIC, *CLIP_L, "aesthetic-model.pth", load_aesthetic, score_aesthetic, 1),
    "clip": Reward(*CLIP_L, *CLIP_L),
}
REWARDS_ACCEPTED = (
    f"{', '.join(REWARDS)}, or NAME=PATH of its weights or of a CLIP-style model, a Hub name or a folder"
)


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


def reward_name(text):
    """An argparse type: of what --reward_model takes, the name of a published one in place of its repository."""
    return next((name for name, reward in REWARDS.items() if text == reward.model), text)


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
        path, commit = reward.model, reward.revision
    base, base_commit = reward.base, reward.base_revision
    with explain_errors("reward_model", path, REWARDS_ACCEPTED):
        _, commit = locate_file(path, reward.file, commit)
        if not published and not os.path.isfile(path):
            # None is found if it has none; a connection that fails is an error, not another tokenizer.
            optional = {"revision": commit, "_raise_exceptions_for_missing_entries": False}
            if any(cached_file(path, file, **optional) for file in TOKENIZER_FILES):
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
        tokenizer = AutoTokenizer.from_pretrained(**base)
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
    """What a score is kept under: the image's file with its size and time, and a hash of its prompt and the reward."""
    status = (Path(args.output_dir) / job.image).stat()
    facts = [job.prompt, scorer.reward.file, {**scorer.source, "name": None}]  # another name makes no other score
    return f"{job.image} {status.st_size} {status.st_mtime_ns} {digest(facts)}"


def kept_scores(args):
    """`{key: score}`, what all processes have kept."""
    paths = sorted(Path(args.output_dir).glob("scores/*.json"))
    return {key: score for path in paths for key, score in json.loads(path.read_text()).items()}


def score_missing(jobs, scorers, args):
    """Scores those images that have no score yet and keeps it; raises `UserError` at a score that is not finite."""
    folder, kept = Path(args.output_dir), kept_scores(args)
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without holding up the others
        for reward, scorer in scorers.items():
            missing = [job for job in jobs if score_key(job, scorer, args) not in kept]
            for batch in batches(missing, f"Scores by {reward}", args):
                images = pool.map(lambda job: Image.open(folder / job.image).convert("RGB"), batch)
                pixels = pool.map(
                    lambda image: scorer.image_processor(image, return_tensors="pt")["pixel_values"], images
                )
                scores = scorer.score(torch.cat(list(pixels)), [job.prompt for job in batch])
                scores = scorer.reward.scale * scores.double().cpu().numpy()
                if not np.isfinite(scores).all():
                    job, score = next(pair for pair in zip(batch, scores) if not math.isfinite(pair[1]))
                    raise UserError(
                        f"{reward} gives {score} to {folder / job.image} ({job.prompt!r}), which ranks nothing. It is"
                        " damaged, or overflows in float16: then give --dtype float32 and another --output_dir."
                    )
                kept |= {score_key(job, scorer, args): float(score) for job, score in zip(batch, scores)}
            if missing:
                save_text(folder / "scores" / f"{PartialState().process_index}.json", json.dumps(kept))


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


def compare(name, table, reward, args):
    """`side_by_side` of base and a model for prompts evenly spaced from the largest to the smallest mean gap."""
    of_prompt = table.groupby(["model", "prompt"], sort=False).agg({reward: "mean", "image": list})
    base, tuned = of_prompt.loc["base"], of_prompt.loc[name]
    gaps = (tuned[reward] - base[reward]).sort_values(ascending=False, kind="stable")
    chosen = gaps.iloc[np.linspace(0, len(gaps) - 1, min(NUM_COMPARED_PROMPTS, len(gaps))).round().astype(int)]
    of_model = [rows.loc[chosen.index, "image"] for rows in (base, tuned)]
    images = [[[Image.open(Path(args.output_dir) / path) for path in paths] for paths in rows] for rows in of_model]
    return side_by_side(*images, [f"{prompt} ({gap:+.2f})" for prompt, gap in chosen.items()])


def escape_markdown(text):
    r"""A text so that Markdown, and the HTML in it, shows it as it is, `a|b <i>` as `a\|b &lt;i&gt;`."""
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def with_ends(row, name, form):
    """A number of `summarise` and its interval as a text."""
    return f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"


def as_markdown(results, duels):
    """What `summarise` returns as Markdown, a table for each reward and group."""
    lines, base = [], results[0]["model"]
    over_base = {(row["reward"], row["group"], row["model"]): row for row in duels if row["opponent"] == base}
    for row in results:
        if row["model"] == base:  # the first of its group
            few = ", too few prompts for an interval to mean much" * (row["num_prompts"] < FEW_PROMPTS)
            title = f"**{row['reward']}**, {escape_markdown(row['group'])} prompts ({row['num_prompts']}{few})"
            header = "| model | median score | less the base's | mean score | win rate over base | ties |"
            lines += ["", f"{title}, 95 % intervals", "", header, "|---" * 6 + "|"]
        cells = [row["model"], with_ends(row, "median", ".3f"), "", f"{row['mean']:.3f}", "", ""]
        if duel := over_base.get((row["reward"], row["group"], row["model"])):
            cells[2] = with_ends(row, "median_less_base", "+.3f")
            cells[4:] = [with_ends(duel, "win_rate", ".1%"), f"{duel['tie_rate']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n"


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


def write_csv(path, table):
    """Writes a table; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    safe = table.astype(object).map(
        lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
    )
    save_text(path, safe.to_csv(index=False))


def collect_scores(jobs, scorers, args):
    """The table of scores.csv: a line for each job, with a column for each reward."""
    kept = kept_scores(args)
    of_reward = {reward: [kept[score_key(job, scorer, args)] for job in jobs] for reward, scorer in scorers.items()}
    return pd.DataFrame(jobs).assign(**of_reward)


def write_results(table, sources, scorers, args):
    """Writes tables and pictures, and returns the Markdown."""
    folder, scores = Path(args.output_dir), {reward: {} for reward in scorers}
    groups = table.drop_duplicates("prompt")["group"].tolist()
    for reward, (name, rows) in itertools.product(scorers, table.groupby("model", sort=False)):
        scores[reward][name] = rows[reward].to_numpy().reshape(len(groups), -1)
    results, duels = summarise(scores, groups, args.seed)
    votes = count_votes(table, args)
    record, text = {"results": results, "win_rates": duels + votes}, as_markdown(results, duels)
    for row in votes:
        win_rate, ties = with_ends(row, "win_rate", ".1%"), f"{row['tie_rate']:.1%}"
        text += f"\n{row['num_votes']} votes: **{row['model']}** wins over the base {win_rate}, ties {ties}\n"
    if args.steps:
        record["best"], sentence = name_best(scores, duels, args)
        text = f"{sentence}\n\n{text}"
    record["models"] = {name: source.identity for name, source in sources.items()}
    record["rewards"] = {reward: scorer.source for reward, scorer in scorers.items()}
    write_csv(folder / "scores.csv", table)
    write_csv(folder / "results.csv", pd.DataFrame(results + record["win_rates"]))
    save_text(folder / "results.json", json.dumps({**record, "args": vars(args)}, indent=2))
    save_text(folder / "results.md", text)
    for name in args.models:
        sheet = compare(name, table, next(iter(scores)), args)
        save_whole(folder / f"comparison-{name}.png", lambda temporary: sheet.save(temporary, "png"))
    return text


# ---- Pages to look at -----------------------------------------------------------------------------------------------

GALLERY = """<!doctype html>
<meta charset="utf-8">
<title>Gallery</title>
<style>
body { font: 14px sans-serif } td, th { border-top: 1px solid #ccc; text-align: left; vertical-align: top }
td:first-child { width: 16em; overflow-wrap: anywhere }
figure { display: inline-block; margin: 4px } img { display: block; height: 192px }
</style>
<p><input id="text" placeholder="words of the prompt">
<select id="group"><option value="">all groups
{% for group in groups %}<option value="{{ group }}">{{ group }}{% endfor %}</select>
<select id="order"><option value="">as given
{% for name in gains %}<option value="{{ loop.index0 }}">by gain of {{ name }}{% endfor %}</select>
<span id="count"></span> prompts; ★ has the highest score at the seed</p>
<table><thead><tr><th>prompt{% for model in models %}<th>{{ model }}{% endfor %}</thead><tbody>
{% for row in rows %}<tr data-group="{{ row.group }}" data-gains="{{ row.gains | tojson }}"><td>{{ row.prompt }}
{% for model in models %}<td>{% for image in row.images[model] %}
<figure><a href="{{ image.image }}"><img loading="lazy" src="{{ image.image }}" alt="{{ model }}"></a>
{% for reward in rewards %}<div>{{ reward }} {{ "%.3f" | format(image[reward]) }}
{{ "★" if image[reward] == image.best[reward] }}</div>{% endfor %}</figure>
{% endfor %}{% endfor %}{% endfor %}</table>
<script>
const [text, group, order, count] = ["text", "group", "order", "count"].map(id => document.getElementById(id))
const body = document.querySelector("tbody"), rows = [...body.rows]
const gain = row => order.value && JSON.parse(row.dataset.gains)[order.value]
const fits = row => (!group.value || row.dataset.group === group.value) &&
  row.cells[0].textContent.toLowerCase().includes(text.value.toLowerCase())
document.oninput = () => {
  body.replaceChildren(...rows.filter(fits).sort((a, b) => gain(b) - gain(a)))
  count.textContent = body.rows.length
}
document.oninput()
</script>
"""


def write_gallery(table, rewards, args):
    """Writes gallery.html: prompts down, models across, every image with its scores, to be sorted and filtered."""
    models, rows = table["model"].unique(), []
    best = table.groupby(["prompt", "seed"])[rewards].transform("max").to_dict("records")
    means = {model: of_model.groupby("prompt")[rewards].mean() for model, of_model in table.groupby("model")}
    gains = {
        f"{model} by {reward}": (means[model] - means["base"])[reward] for model in models[1:] for reward in rewards
    }
    for (prompt, group), images in table.assign(best=best).groupby(["prompt", "group"], sort=False, dropna=False):
        images = {model: of_model.to_dict("records") for model, of_model in images.groupby("model")}
        of_prompt = [float(gain[prompt]) for gain in gains.values()]
        rows.append({"prompt": prompt, "group": group, "gains": of_prompt, "images": images})
    groups, template = table["group"].dropna().unique(), jinja2.Environment(autoescape=True).from_string(GALLERY)
    page = template.render(models=models, rewards=rewards, rows=rows, groups=groups, gains=gains)
    save_text(Path(args.output_dir) / "gallery.html", page)


BLIND = """<!doctype html>
<meta charset="utf-8">
<title>Which is better?</title>
<style>body { font: 18px sans-serif; text-align: center } img { max-width: 48%; max-height: 75vh }</style>
<p id="prompt"></p>
<p><img id="left" alt="1"> <img id="right" alt="2"></p>
<p>Press 1 for the left, 2 for the right, 0 for neither. <span id="progress"></span>
<a id="save" download="votes.json" href="#">Download votes.json</a></p>
<script>
const duels = {{ duels | tojson }}, key = {{ key | tojson }}, votes = JSON.parse(localStorage.getItem(key) || "[]")
const [prompt, left, right, progress, save] = ["prompt", "left", "right", "progress", "save"].map(id =>
  document.getElementById(id))
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
  if (!"012".includes(event.key) || votes.length === duels.length) return
  const { left, right } = duels[votes.length]
  votes.push({ left, right, vote: Number(event.key) })
  localStorage.setItem(key, JSON.stringify(votes))  // a closed page goes on where it was
  show()
}
show()
</script>
"""


def blind_name(image, args):
    """An image's name in blind/, of place and content: it does not tell the model, and is in no other evaluation."""
    content = hashlib.sha256((Path(args.output_dir) / image).read_bytes()).hexdigest()
    return f"{digest([image, content])}.png"


def write_blind(table, args):
    """Fills blind/, which can be handed on: a page with base and tuned image of a seed side by side, without names."""
    folder, rng, duels = Path(args.output_dir) / "blind", np.random.default_rng(args.seed), []
    base = table[table["model"] == "base"].set_index("seed")["image"]
    for job in table.itertuples():
        image = folder.parent / job.image
        save_whole(folder / blind_name(job.image, args), lambda temporary: shutil.copyfile(image, temporary))
        left, right = rng.permutation([job.image, base[job.seed]])
        if job.model != "base":
            duels.append({"prompt": job.prompt, "left": blind_name(left, args), "right": blind_name(right, args)})
    rng.shuffle(duels)
    page = jinja2.Environment(autoescape=True).from_string(BLIND).render(duels=duels, key=digest(duels))
    save_text(folder / "index.html", page)


def count_votes(table, args):
    """Win rates over the base by --votes, rows as `summarise` has of duels; a person's every vote counts."""
    jobs = {blind_name(job.image, args): job for job in table.itertuples() if args.votes}
    won, rows = [], []
    for path in args.votes or []:
        with explain_errors("votes", path, "what the page of --blind in this --output_dir has made"):
            for vote in json.loads(Path(path).read_text()):
                sides = [jobs[vote["left"]], jobs[vote["right"]]]
                tuned = int(sides[0].model == "base")  # the number of its side
                won.append([sides[tuned].model, sides[tuned].prompt, {0: 0.5, 1: 1 - tuned, 2: tuned}[vote["vote"]]])
    for model, votes in pd.DataFrame(won, columns=["model", "prompt", "won"]).groupby("model", sort=False):
        rates = votes.groupby("prompt")["won"].mean().to_numpy()
        row = {"reward": "votes", "group": ALL, "model": model, "opponent": "base", "num_votes": len(votes)}
        ends = win_interval(rates, resample_prompts(len(rates), args.seed))
        rows.append(row | with_interval("win_rate", rates.mean(), ends) | {"tie_rate": (votes["won"] == 0.5).mean()})
    return rows


# ---- Pairs to train on ----------------------------------------------------------------------------------------------


def couple_images(table, reward, args):
    """Couples of lines of `collect_scores`, as dicts: of each prompt the best and worst image, or all that differ."""
    content = [hashlib.sha256((Path(args.output_dir) / image).read_bytes()).hexdigest() for image in table["image"]]
    couples = []
    for _, rows in table.assign(uid=content).drop_duplicates(["prompt", "uid"]).groupby("prompt", sort=False):
        ranked = rows.sort_values(reward, ascending=False).to_dict("records")
        ends = zip(ranked[:1], ranked[1:][-1:])
        couples += ends if args.pairs == "best_worst" else itertools.combinations(ranked, 2)
    return [sorted(couple, key=lambda row: row["uid"]) for couple in couples]  # which is first says nothing


def as_pair(couple, rewards, args):
    """A couple in Pick-a-Pic's columns, with all scores; the first reward labels it."""
    pair = {"caption": couple[0]["prompt"], "ranking_id": "-".join(row["uid"][:16] for row in couple)}
    for i, row in enumerate(couple):
        pair |= {f"jpg_{i}": (Path(args.output_dir) / row["image"]).read_bytes(), f"image_{i}_uid": row["uid"]}
        pair |= {f"{name}_{i}": row[name] for name in ("model", "seed")}
        pair |= {f"score_{i}_{reward}": row[reward] for reward in rewards}
    gap, (low, high) = couple[0][rewards[0]] - couple[1][rewards[0]], args.score_range
    scale = REWARDS.get(rewards[0], Reward()).scale
    soft_label = torch.tensor(gap / scale / (high - low), dtype=torch.float64).sigmoid().item()
    return pair | {"label_0": float(wins(gap, 0)), "label_1": float(wins(0, gap)), "soft_label_0": soft_label}


def write_pairs(table, rewards, args):
    """Writes --pairs_path, which the training scripts take as --dataset_name; raises `UserError` without pairs."""
    couples = couple_images(table, rewards[0], args)
    if not couples:
        raise UserError(f"--pairs_path {args.pairs_path} stays unwritten: of no prompt do two images differ.")

    def save(path):
        schema = pa.Table.from_pylist([as_pair(couples[0], rewards, args)]).schema
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, len(couples), PAIRS_PER_GROUP):  # so many pictures in memory at a time
                rows = [as_pair(couple, rewards, args) for couple in couples[start : start + PAIRS_PER_GROUP]]
                writer.write_table(pa.Table.from_pylist(rows, schema))

    save_whole(Path(args.pairs_path), save)


# ---- Command line ---------------------------------------------------------------------------------------------------


def positive_int(text):
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Medians and win rates, base against tuned.")
    path = {"type": os.path.expanduser}

    add = parser.add_argument_group("models", "Give --models, --run_dir, or both.").add_argument
    add("--pretrained_model_name_or_path", **path, required=True, help="Base model: a Hub name or a folder.")
    add("--revision", help="Revision of the base model on the Hub.")
    add("--variant", help='Variant of the base model\'s weight files, for example "fp16".')
    add("--models", nargs="+", default=[], help=f"Tuned models, each PATH or NAME=PATH: {MODELS_ACCEPTED}.")
    add("--run_dir", **path, help="Output folder of a training run: compares its checkpoints, names the best.")

    add = parser.add_argument_group("prompts", "Give one of --prompts_path and --dataset_name.").add_argument
    add("--prompts_path", nargs="+", **path, help=f"Files, each a group if several: {PROMPTS_ACCEPTED}.")
    add("--dataset_name", **path, help=f"Data set: {DATASET_ACCEPTED}.")
    add("--dataset_split_name", "--split", default="train", help="Split of the data set.")
    add("--caption_column", default="caption", help="Prompt of the images.")
    add("--group_column", help="What results are broken down by, such as Category of Parti-Prompts.")
    add("--max_prompts", type=positive_int, help="Use the first so many prompts.")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_images_per_prompt", type=positive_int, default=1, help="Images, each with its own seed.")
    add("--num_inference_steps", type=positive_int, default=50, help="Denoising steps.")
    add("--guidance_scale", type=float, default=7.5, help="Classifier-free guidance.")
    add("--resolution", type=positive_int, default=512, help="Side of the square images, in pixels.")
    add("--seed", type=int, default=0, help="Seed of the first image; each further one has the next.")
    text = "Precision of the models. Default: float16 on an accelerator, float32 on a CPU."
    add("--dtype", choices=["float32", "float16", "bfloat16"], help=text)
    add("--batch_size", type=positive_int, default=16, help="Images at a time.")

    add = parser.add_argument_group("reward model").add_argument
    text = f"Reward models, each {REWARDS_ACCEPTED}."
    add("--reward_model", type=reward_name, nargs="+", default=["pickscore"], help=text)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", **path, required=True, help="Folder for images, scores and tables.")
    add("--blind", action="store_true", help="Also makes blind/index.html, a page on which people vote by keys.")
    add("--votes", **path, nargs="+", help="Files that this page has made: their win rates stand beside the rewards'.")
    add("--pairs_path", **path, help="Also writes the images as preference pairs to train on, a Parquet file.")
    add("--pairs", choices=["best_worst", "all"], default="best_worst", help="Which two images of a prompt to pair.")
    text = "Range of the first reward, a cosine not times 100, for soft labels. Default: PickScore's published one."
    add("--score_range", nargs=2, type=float, metavar=("MIN", "MAX"), help=text)

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
    """Checks what no type does, and fills in what depends on others; raises `UserError` with a line for each problem.

    --models, with the checkpoints of --run_dir, and --reward_model become `{name: path}`; `args.steps` is
    `{checkpoint: step}`.
    """
    data, run, pairs = args.dataset_name, args.run_dir, args.pairs_path
    names = os.listdir(run) if run and os.path.isdir(run) else []
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name))
    base_alone, (low, high) = not args.models and run is None, args.score_range or (0, 1)
    checks = [
        (not math.isfinite(args.guidance_scale), f"--guidance_scale must be finite, got {args.guidance_scale}."),
        (args.seed < 0, f"--seed must not be negative, got {args.seed}."),
        (args.resolution % 8, f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}."),
        (Path(args.output_dir).is_file(), f"--output_dir {args.output_dir} is a file: name a folder."),
        (base_alone and (args.blind or not pairs), "Give tuned models with --models, or a run with --run_dir."),
        (run and not steps, f"--run_dir {run} has no folders named checkpoint-STEP."),
        (
            pairs and base_alone and args.num_images_per_prompt < 2,
            "--pairs_path needs two images of a prompt: give --num_images_per_prompt 2 or more, or --models.",
        ),
        (pairs and not pairs.endswith(".parquet"), f"--pairs_path {pairs} must end in .parquet."),
        (pairs and Path(pairs).exists(), f"--pairs_path {pairs} exists: move it away, or name another file."),
        (not pairs and (args.score_range or args.pairs == "all"), "--score_range and --pairs go with --pairs_path."),
        (not -math.inf < low < high < math.inf, f"--score_range must be a MIN and a larger MAX, got {low} {high}."),
        ((args.prompts_path is None) == (data is None), "Give one of --prompts_path and --dataset_name."),
        (
            data and Path(data).is_file() and not data.endswith(".parquet"),
            f"--dataset_name {data} is a file: give it to --prompts_path.",
        ),
    ]
    for path in args.votes or []:
        checks.append((not Path(path).is_file(), f"--votes {path} is not a file."))
    for path in args.prompts_path or []:
        wrong = not Path(path).is_file() or Path(path).suffix not in PROMPT_FILES
        checks.append((wrong, f"--prompts_path {path} is not a file that ends in {', '.join(PROMPT_FILES)}."))
    for flag, value in vars(args).items():
        empty = value == "" or isinstance(value, list) and "" in value
        checks.append((empty, f"--{flag} is empty. Is a variable of the shell not set?"))
    problems = [sentence for wrong, sentence in checks if wrong]
    args.steps = {f"checkpoint-{step}": step for step in steps}
    args.models = named_sources(args.models, "models", ["base", *args.steps], problems)
    taken = ["best", "uid", "votes", *Job._fields]
    args.reward_model = named_sources(args.reward_model, "reward_model", taken, problems)
    first = next(iter(args.reward_model))
    if args.score_range is None and args.reward_model[first] == first and first in REWARDS:
        args.score_range = REWARDS[first].label_range
    if pairs and args.score_range is None:
        problems.append(f"--pairs_path needs --score_range MIN MAX: no labels by {first} have been published.")
    if problems:
        raise UserError("\n".join(problems))
    args.models = {name: os.path.expanduser(path) for name, path in args.models.items()}
    args.models |= {name: f"{run}/{name}" for name in args.steps}
    args.reward_model = {name: os.path.expanduser(path) for name, path in args.reward_model.items()}


# ---- The run --------------------------------------------------------------------------------------------------------


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=MERGE_TIMEOUT)
    args.dtype = args.dtype or ("float32" if state.device.type == "cpu" else "float16")
    group_of = load_prompts(args)
    sources = locate_models(args)
    open_output(list(group_of), sources, args)
    scorers = load_scorers(state.device, args)  # before anything is drawn: they may not be there
    jobs = list_jobs(sources, group_of, args)
    for name in sources:
        own = [job for job in jobs[state.process_index :: state.num_processes] if job.model == name]
        draw_images(own, sources, args)
        score_missing(own, scorers, args)
    state.wait_for_everyone()
    if state.is_main_process:
        score_missing(jobs, scorers, args)  # what a file of another machine does not show yet
        table = collect_scores(jobs, scorers, args)
        print(write_results(table, sources, scorers, args))
        write_gallery(table, list(scorers), args)
        if args.blind:
            write_blind(table, args)
        if args.pairs_path is not None:
            write_pairs(table, list(scorers), args)
        print(f"\nImages, scores and pictures are in {args.output_dir}: look at its gallery.html.")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)  # alone, without a traceback
        sys.exit(2)
