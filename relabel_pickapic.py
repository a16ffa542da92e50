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
#     "transformers>=4.55.0",
#     "accelerate>=1.9.0",
#     "datasets>=3.6.0",
#     "pyarrow>=17.0",
#     "pillow>=10.1",
# ]
# ///
"""Scores preference pairs with a reward model, once, and writes the soft preference of each into a small Parquet file.

    accelerate launch relabel_pickapic.py --dataset_name PICKAPIC_V2 --split train --output_path labels.parquet

The reward r is the cosine of the image's and the caption's embedding (PickScore, https://arxiv.org/abs/2305.01569, or
any CLIP-style model), without the model's logit scale, or another reward of `REWARDS`. It is brought to [0, 1], and
the soft preference of a pair, alpha / gamma in SmPO-Diffusion (https://arxiv.org/abs/2506.02698), is the softmax:

    r' = (r - min) / (max - min)        soft_label_0 = exp(r'_0) / (exp(r'_0) + exp(r'_1)) = sigmoid(r'_0 - r'_1)

PickScore has the range of the published labels of Pick-a-Pic v2, so labels do not depend on the subset; others have
the range of all scored images, or what is given.

The file has a row for each row of the data set, in its order, and no images: the keys of the pair (`image_0_uid`,
`image_1_uid`, `ranking_id`), the human `label_0`, the raw `score_0` and `score_1`, `soft_label_0`, `valid` and, where
that is false, `invalid_reason`. Its metadata say, as JSON under `smpo_labels`, which model at which revision scored
what, the range, and the counts.

Each (image, caption) is scored where it first occurs. The rows are cut into pieces, the pieces dealt to the processes
and their workers, and each finished piece is written whole into a folder beside the output (labels.scores/HASH, the
hash of data, reward model and precision). The same command, started again after whatever stopped it, goes on with what
is missing, with any number of processes, and ends with the same file; another command finds nothing there. Several
machines have to share the folder, which is removed when all is written and uploaded.
"""

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, NamedTuple


# ---- Command line ---------------------------------------------------------------------------------------------------

LABEL_KEYS = ["image_0_uid", "image_1_uid", "ranking_id"]  # the columns of a labels file that name a pair
FOLDERS_ACCEPTED = (
    "a folder with images in `preferred` and others of the same names in `rejected`, and their captions in a"
    " `metadata.csv` (file_name,caption) or as NAME.txt beside the preferred ones"
)
DATASET_ACCEPTED = "a Hub name, a folder, or a Parquet file or glob; `Dataset.to_parquet` writes one"
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
finite = checked(float, lambda value: True, "a finite number")


def nonempty(text):
    """An argparse type: a text that is not empty, with ~ for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: is the variable set that it comes from?")
    return os.path.expanduser(text)


def reward_name(text):
    """An argparse type: of what --reward_model takes, the name of a published one in place of its repository."""
    return next((name for name, (model, _) in PUBLISHED.items() if text == model), text)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Writes the soft preference of each pair of a data set.")
    group = parser.add_argument_group("data")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--dataset_name", type=nonempty, help=f"Data set: {DATASET_ACCEPTED}.")
    text = f"Write a data set, without soft labels, of your own pairs: {FOLDERS_ACCEPTED}."
    add("--pairs_from", type=nonempty, help=text)
    add = group.add_argument
    add("--dataset_split_name", "--split", type=nonempty, default="train", help="Split of the data set.")
    add("--streaming", action="store_true", help="Read a data set on the Hub in place, not downloaded first.")
    add("--image_columns", nargs=2, default=["jpg_0", "jpg_1"], help="Encoded bytes, or a `datasets.Image`.")
    add("--caption_column", default="caption", help="Prompt of the images.")
    add("--key_columns", nargs="+", default=LABEL_KEYS, help="What names images 0 and 1, and the comparison if known.")
    add("--human_label_column", default="label_0", help="In {0, 0.5, 1}; training leaves ties out. May be missing.")

    add = parser.add_argument_group("reward model").add_argument
    add("--reward_model", type=reward_name, default="pickscore", help=f"Reward model: {REWARDS_ACCEPTED}.")
    text = "Range of the raw reward. Default: the published one of pickscore, of others that of the scores."
    add("--score_range", nargs=2, type=finite, metavar=("MIN", "MAX"), help=text)

    add = parser.add_argument_group("memory and speed").add_argument
    text = "Precision of the models. Default: float16 on an accelerator, float32 on a CPU."
    add("--dtype", choices=["float32", "float16", "bfloat16"], help=text)
    add("--batch_size", type=int_from_1, default=64, help="Pairs at a time; fewer where they do not fit.")
    add("--dataloader_num_workers", type=int_from_0, help="Processes that read images. Default: the cores, shared.")

    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=nonempty, required=True, help="Parquet file to write. It must not exist.")
    add("--push_to_hub", action="store_true", help="Upload what was written to a data set repository.")
    add("--hub_dataset_id", help="Repository to upload to. Default: the name of --output_path.")
    add("--hub_public", action="store_true", help="Make a new repository public, not private.")

    return resolve(parser.parse_args(input_args), parser.get_default)


def resolve(args, get_default):
    """Checks what no type does, and counts the workers; raises `UserError` with a line for each problem."""
    (low, high), problems = args.score_range or (0, 1), []
    if not args.output_path.endswith(".parquet"):
        problems.append(f"--output_path must end in .parquet, got {args.output_path}.")
    if low >= high:
        problems.append(f"--score_range must be a MIN and a larger MAX, got {low} {high}.")
    given = {f"--{name}" for name, value in vars(args).items() if value != get_default(name)}
    if args.pairs_from and (unused := given - {"--pairs_from", "--output_path"}):
        problems.append(f"{', '.join(sorted(unused))} can do nothing with --pairs_from: label what it writes.")
    data, labels = Path(args.dataset_name or "").resolve(), Path(args.output_path).resolve()
    if args.dataset_name and (labels.match(str(data)) or (data.is_dir() and data in labels.parents)):
        problems.append(f"--output_path {args.output_path} would lie among the data of --dataset_name: name another.")
    if (args.hub_dataset_id or args.hub_public) and not args.push_to_hub:
        problems.append("--hub_dataset_id and --hub_public do nothing without --push_to_hub.")
    if len(args.key_columns) not in (2, 3):
        problems.append(f"--key_columns takes two or three columns, got {' '.join(args.key_columns)}.")
    if problems:
        raise UserError("\n".join(problems))
    if args.dataloader_num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.dataloader_num_workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return args


# Here, so that a mistake in a flag is told before the imports below, which take seconds.
# ruff: noqa: E402
if __name__ == "__main__":
    with short_errors():
        ARGS = parse_args()


import datasets
import fsspec
import numpy as np
import pandas as pd
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, find_executable_batch_size, parse_flag_from_env
from datasets import load_dataset_builder
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file


logger = get_logger(__name__)

# Pillow resizes, on every machine: torchvision, where it is installed, gives other pixels. transformers 4: `use_fast`.
PIL_BACKEND = (
    {"backend": "pil"} if importlib.util.find_spec("transformers.image_processing_backends") else {"use_fast": False}
)
REASONS = ["no caption", "not a readable image", "not finite"]  # why a pair has no label, as parts of `invalid_reason`
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow would also start Ghostscript for PostScript
MAX_PIXELS, MAX_ASPECT = 50_000_000, 100  # of an image; a small file can hold more than memory does
PIECE_ROWS = 512  # at most, of a piece, which each worker of a stopped run may have to score again
MAX_PARTS = 8  # pieces of a row group, however large it is, as each is read from the group's beginning
READ_BUFFER = 8 * 2**20  # bytes fetched of one column at a time
NUM_READERS = 16  # threads that read what is small of many files
LABELS_ROW_GROUP = 65_536  # rows; a reader of few rows goes by the page index
OWN_ROW_GROUP = 64  # pairs, with their images
MERGE_TIMEOUT = timedelta(days=7)  # how long a process waits at the end for a slower one


# ---- The maths ------------------------------------------------------------------------------------------------------


def soft_label(score_0, score_1, score_min, score_max):
    """P(image 0 is preferred), alpha / gamma of SmPO-Diffusion seen from image 0.

    `sigmoid(r'_0 - r'_1)` with `r' = (score - score_min) / (score_max - score_min)`: the softmax over the two scores
    after global min-max normalisation, outside of whose range nothing is clamped.

    Args:
        score_0, score_1: raw rewards of the two images: numbers or arrays `[P]`; NaN gives NaN.
        score_min, score_max: the range of the raw reward over all scored images.

    Returns:
        float64 tensor in (0, 1), a scalar or `[P]`.

    Raises:
        ValueError: the range is empty or not finite.

    >>> soft_label([0.24, 0.21], [0.22, 0.21], score_min=0.12, score_max=0.28)  # gaps of 0.02 / 0.16 and 0
    tensor([0.5312, 0.5000], dtype=torch.float64)
    """
    if not -math.inf < score_min < score_max < math.inf:
        raise ValueError(f"score_min must be less than score_max, got {score_min} and {score_max}.")
    score_0, score_1 = (torch.as_tensor(score, dtype=torch.float64) for score in (score_0, score_1))
    return torch.sigmoid((score_0 - score_1) / (score_max - score_min))


# ---- Data: Parquet files are read where they lie, a few columns or rows at a time; of all else they are made first --


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


class ParquetShards:
    """Rows of Parquet files, read where they lie: paths, or URLs that fsspec knows (`hf://`).

    `row_groups` holds the numbers of rows of each file, `sizes` bytes. Raises `UserError` if a file is not whole.
    """

    def __init__(self, files):
        def footer(path):
            with explain_errors("dataset_name", path, "whole Parquet files: fetch it again"), self.open(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                return file.schema_arrow, [g.num_rows for g in groups], [g.total_byte_size for g in groups]

        with ThreadPoolExecutor(NUM_READERS) as pool:
            schemas, self.row_groups, self.sizes = zip(*pool.map(footer, files))
        self.files, self.schemas = files, schemas

    def open(self, path):
        """The file, of which some pages of each column that is read are held at a time."""
        if "://" in path:
            filesystem, inner_path = fsspec.core.url_to_fs(path)
            path = filesystem.open(inner_path, "rb", cache_type="none")
        return pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)

    def read(self, piece, columns, batch_rows):
        """Record batches of a `Piece`, of up to `batch_rows` rows."""
        start, stop = piece.first_row, piece.first_row + piece.stop - piece.start
        with self.open(self.files[piece.shard]) as file:
            for batch in file.iter_batches(batch_rows, [piece.group], columns, use_threads=False):
                if start < len(batch):
                    yield batch[max(start, 0) : stop]
                start, stop = start - len(batch), stop - len(batch)
                if stop <= 0:
                    return

    def read_columns(self, columns):
        """Columns of all rows, as a table: for keys and labels, not for images."""

        def read(path):
            with explain_errors("dataset_name", path, "whole Parquet files: fetch it again"), self.open(path) as file:
                return file.read(columns, use_threads=False)  # Arrow's threads may outlive Python's end, which aborts

        with ThreadPoolExecutor(NUM_READERS) as pool:
            tables = tqdm(pool.map(read, self.files), total=len(self.files), desc="Keys", unit="file")
            with explain_errors("dataset_name", "of several files", "files whose columns have the same types"):
                return pa.concat_tables(tables, promote_options="permissive")


def open_data(args):
    """The data set of the command line, and its commit if it lies on the Hub.

    Raises `UserError` if it cannot be read or is empty, lacks a column or has one of a wrong type.
    """
    name, split = args.dataset_name, args.dataset_split_name
    with explain_errors("dataset_name", f"{name} --dataset_split_name {split}", DATASET_ACCEPTED):
        if name.endswith(".parquet"):
            builder = load_dataset_builder("parquet", data_files={split: name})
        elif Path(name).is_file():
            raise ValueError("it is a file, and none named .parquet: pandas converts others")
        else:
            builder = load_dataset_builder(name)
        known = builder.config.data_files or {}
        if known and re.split(r"[+\[]", split)[0] not in known:
            raise ValueError(f"it has the splits {', '.join(map(str, known))}")
        files = list(known.get(split, []))
        commit = next(iter(re.findall("@([0-9a-f]{40})/", " ".join(files))), None)
        files = files if builder.name == "parquet" else []
        if args.streaming and not files:
            raise ValueError("--streaming reads whole splits of Parquet files, and this is none: leave it out")
        if not files:
            copy = Path(builder.cache_dir) / f"{hashlib.sha256(split.encode()).hexdigest()}.parquet"
            with PartialState().local_main_process_first():
                builder.download_and_prepare()
                if not copy.exists():
                    data = builder.as_dataset(split)
                    write_whole(copy, lambda file: data.to_parquet(file, batch_size=PIECE_ROWS))
            files = [str(copy)]
        elif not args.streaming:
            files = datasets.DownloadManager().download(files)
    shards = ParquetShards(files)
    if not any(itertools.chain(*shards.row_groups)):
        raise UserError(f"--dataset_name {name} has no rows in the split {split}.")
    for file, schema in zip(files, shards.schemas):
        check_columns(file, schema, args)
    return shards, commit


def check_columns(file, schema, args):
    """Raises `UserError` with all columns of a file that are missing, or of a wrong type."""
    text, number = "(large_)?string", r"u?int\d+|float|double"
    image = "(large_)?binary|struct<(bytes: .*path: .*|path: .*bytes: .*)>"
    accepted = {
        "image_columns": (args.image_columns, image, "encoded images"),
        "key_columns": (args.key_columns, f"{text}|{number}", "texts or numbers"),
        "caption_column": ([args.caption_column], text, "texts"),
        "human_label_column": ([args.human_label_column], number, "numbers"),
    }
    optional, problems = [*args.key_columns[2:], args.human_label_column], []
    for flag, (names, types, what) in accepted.items():
        for name in names:
            kind = str(schema.field(name).type) if name in schema.names else None
            if kind is None and name not in optional:
                problems.append(f"--{flag} {name}: there is no such column.")
            elif kind is not None and not re.fullmatch(f"null|{types}", kind):
                problems.append(f"--{flag} {name} holds {kind}, not {what}.")
    if problems:
        raise UserError("\n".join([*problems, f"Name the right ones: {file} has {', '.join(schema.names)}."]))


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


# ---- Scoring piece by piece. The place of an image in the data set is 2 row + side ----------------------------------


class Piece(NamedTuple):
    """Consecutive rows, which are scored and kept together: a row group of a file, or a part of a large one."""

    shard: int
    group: int
    first_row: int  # in the row group
    start: int  # first row in the data set
    stop: int  # row after the last

    @property
    def places(self):
        return slice(2 * self.start, 2 * self.stop)


def cut_pieces(row_groups):
    """The pieces of files, of which the rows of each row group are given, in the order of the rows."""
    pieces, start = [], 0
    for shard, groups in enumerate(row_groups):
        for group, num_rows in enumerate(groups):
            size = max(PIECE_ROWS, -(-num_rows // MAX_PARTS))
            for row in range(0, num_rows, size):
                pieces.append(Piece(shard, group, row, start + row, start + min(row + size, num_rows)))
            start += num_rows
    return pieces


class PieceImages(torch.utils.data.IterableDataset):
    """What the reward model takes of pieces; each worker reads and prepares pieces of its own.

    Yields dicts, of up to `batch_size` pairs each and never of two pieces, so that a score does not depend on where an
    earlier run was stopped: the `piece`; a frame `found` of its images by their places, with an int64 `hash`, a
    `problem`, text or None, and no `score` yet; and the `pixels` `[N, 3, H, W]` of those that are wanted and have no
    problem. If a file breaks off, there is only an `error`.
    """

    def __init__(self, shards, pieces, wanted, batch_size, image_processor, args):
        self.shards, self.pieces, self.wanted = shards, pieces, wanted
        self.batch_size, self.image_processor, self.args = batch_size, image_processor, args

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for piece in self.pieces[worker.id :: worker.num_workers] if worker else self.pieces:
            start = 2 * piece.start
            try:
                for rows in self.shards.read(piece, self.args.image_columns, self.batch_size):
                    images = zip(*(rows[name].to_pylist() for name in self.args.image_columns))
                    images = list(itertools.chain.from_iterable(images))
                    yield {"piece": piece, **self.prepare(images, range(start, start + len(images)))}
                    start += len(images)
            except (OSError, HTTPError, pa.ArrowException) as error:
                file = self.shards.files[piece.shard]
                yield {"error": f"{file} breaks off in the row group {piece.group}: {error}"}

    def prepare(self, images, places):
        problems, pixels = [None] * len(images), []
        for i in np.flatnonzero(self.wanted[places]):
            try:
                image = decode_image(images[i])
            except ValueError as error:
                problems[i] = str(error)
                continue
            values = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
            pixels.append(values.to(getattr(torch, self.args.dtype)))
        found = {"hash": [hash_of(data) for data in images], "problem": problems, "score": np.float32("nan")}
        return {"found": pd.DataFrame(found, index=places), "pixels": torch.stack(pixels) if pixels else None}


def hash_of(data):
    """64-bit hash of an encoded image, or of the `{"bytes", "path"}` that a `datasets.Image` column holds."""
    data = data["bytes"] if isinstance(data, dict) else data
    return int.from_bytes(hashlib.blake2b(data or b"", digest_size=8).digest(), "little", signed=True)


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


def score_pieces(batch_size, paths, wanted, captions, shards, scorer, args):
    """Scores the wanted images of the pieces in `{piece: path}` that are not written yet; each is when it is finished.

    `wanted` says which images of the data set to score, bool `[2 P]`; `captions` are `[2 P]` texts.
    """
    state = PartialState()
    pieces = [piece for piece, path in paths.items() if not path.exists()]
    num_workers = min(args.dataloader_num_workers, len(pieces))
    loader = torch.utils.data.DataLoader(
        PieceImages(shards, pieces, wanted, batch_size, scorer.image_processor, args),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
        pin_memory=state.device.type == "cuda",
    )
    under_way = defaultdict(list)  # frames of the batches of a piece
    total = sum(wanted[piece.places].sum() for piece in pieces)
    bar = tqdm(total=total, desc="Images", unit="image", disable=not state.is_local_main_process)
    for batch in loader:
        if "error" in batch:
            logger.error(str(UserError(batch["error"])), main_process_only=False)  # without a password
            continue
        piece, found = batch["piece"], batch["found"]
        places = found.index[wanted[found.index] & found["problem"].isna()]
        if len(places):
            found.loc[places, "score"] = scorer.score(batch["pixels"], captions[places]).cpu().numpy()
        bar.update(len(places))
        under_way[piece].append(found)
        if sum(map(len, under_way[piece])) == 2 * (piece.stop - piece.start):
            write_whole(paths[piece], pd.concat(under_way.pop(piece)).to_parquet)
    bar.close()
    logger.info(f"{bar.n} images scored in {bar.format_dict['elapsed']:.1f} s, {batch_size} pairs at a time.")


def score_together(prefix, pieces, wanted, captions, shards, source, folder, args):
    """`score_pieces` with all processes, each a share of the pieces: frame of their `hash`, `problem` and `score`.

    Its index are the places. Raises `UserError` if files break off.
    """
    state = PartialState()
    paths = {piece: folder / f"{prefix}-{piece.start:09d}.parquet" for piece in pieces}
    mine = {piece: paths[piece] for piece in pieces[state.process_index :: state.num_processes]}
    if not all(path.exists() for path in mine.values()):
        score_as_fits = find_executable_batch_size(score_pieces, args.batch_size)
        try:
            scorer = load_reward(source, state.device, args.dtype)
            score_as_fits(mine, wanted, captions, shards, scorer, args)
        except RuntimeError as error:  # of the model, or accelerate's when not even one pair fits
            if not isinstance(error, torch.OutOfMemoryError) and "executable batch size" not in str(error):
                raise
            problem = f"--reward_model {args.reward_model} has too little memory on {state.device} for one pair"
            raise UserError(f"{problem}: free some, or use a smaller model.") from error
    state.wait_for_everyone()
    missing = [shards.files[piece.shard] for piece, path in paths.items() if not path.exists()]
    if missing:
        advice = f"All else is scored and kept in {folder}: fetch them again, and start the same command again."
        raise UserError("\n".join(["Files that could not be read, see above:", *dict.fromkeys(missing), advice]))
    return pd.concat(map(pd.read_parquet, paths.values()))


def score_data_set(rows, shards, source, folder, args):
    """Scores P pairs: frame `[2 P]` of `problem`, text or missing, and `score`, number or NaN.

    A place has the score of the first one with the same uid, caption and bytes. Where uid and caption first occur is
    scored first, and after that what proves to have other bytes.
    """
    captions = np.repeat(rows["caption"].to_pandas().to_numpy(dtype=object), 2)
    caption = pd.factorize(captions)[0]  # -1: none
    uids = [rows[key].cast(pa.large_string()).to_pandas() for key in LABEL_KEYS[:2]]
    uid = pd.factorize(np.stack(uids, axis=1).ravel())[0]
    place = np.arange(len(uid))
    uid = np.where(uid < 0, -1 - place, uid)  # no uid: an image of its own
    pieces, common = cut_pieces(shards.row_groups), (captions, shards, source, folder, args)

    wanted = ~pd.DataFrame({"uid": uid, "caption": caption}).duplicated().to_numpy() & (caption >= 0)
    found = score_together("piece", pieces, wanted, *common)
    first = pd.Series(place).groupby([uid, caption, found["hash"]], sort=False).transform("first").to_numpy()
    again = (first == place) & (caption >= 0) & ~wanted
    if again.any():
        logger.warning(f"{again.sum()} images have other bytes than the first of their uid: they are scored, too.")
        some = [piece for piece in pieces if again[piece.places].any()]
        found.loc[again] = score_together("again", some, again, *common)
    return found.loc[first].reset_index(drop=True)


# ---- The folder of a run, which a stopped one goes on with ----------------------------------------------------------


def files_of(path):
    """Names and hashes of the files of a folder, or of one, but for hidden ones; none if there is nothing there."""
    found = []
    for file in sorted([Path(path), *Path(path).rglob("*")]):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            with pa.memory_map(str(file)) as content:
                found.append([str(name), hashlib.blake2b(content.read_buffer(), digest_size=16).hexdigest()])
    return found


def read_rows(shards, args):
    """Keys, human `label_0` and `caption` of all pairs: table `[P]`. Raises `UserError` if there are no captions."""
    columns = dict(zip(LABEL_KEYS, args.key_columns))
    columns |= {"label_0": args.human_label_column, "caption": args.caption_column}
    in_all = set.intersection(*(set(schema.names) for schema in shards.schemas))
    columns = {name: column for name, column in columns.items() if column in in_all}
    table = shards.read_columns([*dict.fromkeys(columns.values())])
    if table[args.caption_column].null_count == len(table):
        raise UserError(f"--caption_column {args.caption_column} of {args.dataset_name} holds no captions.")
    return pa.table({name: table[column] for name, column in columns.items()})


def start_run(shards, args):
    """The folder for the scores of this run, its rows (`read_rows`), and its reward model (`find_reward`).

    The folder's name is a hash of data, reward model and precision: a run that goes on finds its pieces, and takes the
    reward model at the commit of its start; another one finds nothing. Data are known by sizes, identifiers and
    captions, not by a commit, which an edit of their README changes. Raises `UserError` if the model has other files
    now, or if there are finished labels of another run.
    """
    run = [None, None, None]
    if PartialState().is_main_process:
        rows, labels_path = read_rows(shards, args), Path(args.output_path)
        facts = [args.image_columns, args.dtype, args.reward_model, shards.row_groups, shards.sizes]
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8)
        names = rows.select([*LABEL_KEYS[:2], "caption"]).to_pandas()
        digest.update(pd.util.hash_pandas_object(names, index=False).to_numpy())
        folder = labels_path.with_suffix(".scores") / digest.hexdigest()
        path = folder / "run.json"
        if path.exists():
            logger.info(f"Going on with the run in {folder}.")
            source = json.loads(path.read_text())
            model = source["reward_model"]
            if files_of(model) not in ([], source["files"]):  # when all is scored, none are needed
                found = f"--reward_model {model} has other files than when the run in {folder} began"
                raise UserError(f"{found}. Put them back, or remove that folder to score everything anew.")
        else:
            if labels_path.exists():
                raise UserError(f"--output_path: {labels_path} exists. Move it away, or write another file.")
            for other in folder.parent.glob("*/run.json"):
                logger.warning(f"{other.parent} holds the scores of a run with other data, another model or flags.")
            name, equals, model = args.reward_model.partition("=")
            if not equals or "/" in name:  # a path may have an = of its own
                name, model = Path(args.reward_model).name, args.reward_model
            source = find_reward(name, os.path.expanduser(model))
            source["files"] = files_of(source["reward_model"])
            write_whole(path, lambda file: file.write(json.dumps(source).encode()))
        run = [folder, rows, source]
    return broadcast_object_list(run)


# ---- Labels and their upload ----------------------------------------------------------------------------------------


def public_name(name, commit):
    """A name on the Hub; of a path or URL, which have no commit, its last part: no password, no folder."""
    return name if commit else re.sub("[?#].*", "", Path(name).absolute().name)


def make_labels(found, rows, source, commit, args):
    """The labels file of P pairs as a table; `found` is of `score_data_set`. Its metadata say all that led to it.

    Raises `UserError` if there are not two different scores.
    """
    scores = found["score"].to_numpy(copy=True)  # PyTorch warns of arrays that may not be written to
    finite = np.isfinite(scores)
    problems = found["problem"].where(found["problem"].notna() | finite, "the score is not finite")
    problems = [f"image {i % 2}: {text}" if isinstance(text, str) else None for i, text in enumerate(problems)]
    reasons = ["; ".join(filter(None, pair)) or None for pair in zip(problems[::2], problems[1::2])]
    reasons = pa.array(np.where(rows["caption"].is_valid(), reasons, REASONS[0]), pa.string())
    bad = reasons.drop_null().to_pylist()

    seen, published = np.unique(scores[finite]).tolist(), source["label_range"]
    if len(bad) == len(rows) or not (args.score_range or published or len(seen) > 1):
        found = f"{finite.sum()} of {len(scores)} images have a score, {len(seen)} different ones"
        why = f"Reasons: {pd.Series(bad).value_counts().head(3).to_dict()}"
        raise UserError(f"{found}: at least the two of a pair are needed. Check --image_columns. {why}.")
    low, high = args.score_range or published or (seen[0], seen[-1])
    range_from = "the command line" if args.score_range else "published labels" if published else "the scores"
    label = soft_label(scores[::2], scores[1::2], low, high).numpy().astype(np.float32)
    labels = {name: rows[name] for name in rows.column_names if name != "caption"}
    labels |= {f"score_{i}": pa.array(scores[i::2], mask=~finite[i::2]) for i in (0, 1)}
    labels["soft_label_0"] = pa.array(label, mask=~np.isfinite(label))
    labels |= {"valid": reasons.is_null(), "invalid_reason": reasons}

    metadata = {"dataset_name": public_name(args.dataset_name, commit), "dataset_revision": commit}
    for name, revision in (("reward_model", "revision"), ("reward_processor", "processor_revision")):
        metadata |= {name: public_name(source[name], source[revision]), revision: source[revision]}
    metadata |= {"dataset_split_name": args.dataset_split_name, "dtype": args.dtype}
    metadata |= {"score_min": low, "score_max": high, "range_from": range_from}
    metadata |= {"num_rows": len(rows), "num_valid": len(rows) - len(bad), "num_invalid": len(bad)}
    metadata["invalid"] = {kind: sum(kind in reason for reason in bad) for kind in REASONS}
    metadata |= {"transformers": transformers.__version__, "pillow": PIL.__version__}
    return pa.table(labels, metadata={"smpo_labels": json.dumps(metadata)}), metadata


def write_labels(labels, path):
    """Writes the labels file; raises `UserError` if there is another one."""
    data = io.BytesIO()
    pq.write_table(labels, data, compression="zstd", row_group_size=LABELS_ROW_GROUP, write_page_index=True)
    if path.exists() and path.read_bytes() != data.getvalue():
        raise UserError(f"{path} exists, with other labels: move it away, and start the same command again.")
    write_whole(path, lambda file: file.write(data.getbuffer()))


def report(labels, metadata):
    """Logs what is worth knowing of the labels before training on them."""
    logger.info(json.dumps(metadata, indent=2))
    frame = labels.filter(labels["valid"]).to_pandas()
    ends = np.quantile(np.abs(2 * frame["soft_label_0"] - 1), [0.1, 0.5, 0.9])
    logger.info("|2 soft_label_0 - 1|, 10 %, median, 90 %: {:.4f}, {:.4f}, {:.4f}".format(*ends))
    if "label_0" in frame:
        decided = frame[frame["label_0"].notna() & (frame["label_0"] != 0.5) & (frame["soft_label_0"] != 0.5)]
        agreed = ((decided["soft_label_0"] > 0.5) == (decided["label_0"] > 0.5)).sum()
        logger.info(f"The label agrees with people on {agreed} of the {len(decided)} pairs that both decided.")


def upload(path, metadata, args):
    """Uploads labels and a card; raises `UserError` if that fails."""
    split = args.dataset_split_name
    configs = [{"config_name": "default", "data_files": [{"split": split, "path": path.name}]}]
    card = f"""---
tags: [smpo, preference, text-to-image]
configs: {json.dumps(configs)}
---

# Soft preference labels

`{path.name}`: P(image 0 is preferred) of each pair of `{metadata["dataset_name"]}`, split `{split}`,
for SmPO-Diffusion (https://arxiv.org/abs/2506.02698).

```json
{json.dumps(metadata, indent=2)}
```
"""
    repo, hub = {"repo_id": args.hub_dataset_id or path.stem, "repo_type": "dataset"}, HfApi()
    try:
        repo["repo_id"] = hub.create_repo(**repo, private=not args.hub_public, exist_ok=True).repo_id
        files = {"README.md": card.encode(), path.name: path}
        there = hub.list_repo_files(**repo)
        if path.name in there:
            raise ValueError(f"{repo['repo_id']} has a {path.name} already")
        operations = [CommitOperationAdd(*file) for file in files.items() if file[0] not in there]
        hub.create_commit(**repo, operations=operations, commit_message="Soft preference labels")
    except Exception as error:  # over the years huggingface_hub has had the errors of two HTTP libraries
        advice = "Start the same command again to upload it, or with another --hub_dataset_id."
        raise UserError(f"--push_to_hub: {path} is written, and cannot be uploaded: {error}\n{advice}") from error
    logger.info(f"Uploaded to {repo['repo_id']}.")


# ---- Pairs of one's own ---------------------------------------------------------------------------------------------


def write_own_pairs(folder, path):
    """Makes a data set of two folders, in Pick-a-Pic's columns: image 0 is preferred, a uid is the hash of its bytes.

    Raises `UserError` with images that lack a partner or a caption.
    """
    preferred, rejected = (
        {image.name: image for image in folder.glob(f"{side}/[!.]*") if image.is_file() and image.suffix != ".txt"}
        for side in ("preferred", "rejected")
    )
    texts = {name: image.with_suffix(".txt") for name, image in preferred.items()}
    with explain_errors("pairs_from", folder, f"{FOLDERS_ACCEPTED}, in UTF-8"):
        captions = {name: text.read_text("utf-8-sig") for name, text in texts.items() if text.exists()}
        if (folder / "metadata.csv").exists():
            table = pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False, encoding="utf-8-sig")
            if not isinstance(table.index, pd.RangeIndex):  # pandas would shift the cells
                raise ValueError("a line of metadata.csv has more cells than the first: quote texts with ','")
            captions |= dict(table[["file_name", "caption"]].values)
    captions = {name: caption.strip() for name, caption in captions.items()}
    alone = preferred.keys() ^ rejected.keys()
    mute = {name for name in preferred if not captions.get(name)}
    if alone or mute or not preferred:
        found = f"{len(preferred)} preferred images; in one folder only: {sorted(alone)}; no caption: {sorted(mute)}"
        raise UserError(f"--pairs_from {folder} has {found}. Accepted: {FOLDERS_ACCEPTED}.")
    if path.exists():
        raise UserError(f"--output_path: {path} exists. Move it away, or write another file.")

    def as_row(number, name):
        images = [side[name].read_bytes() for side in (preferred, rejected)]
        keys = dict(zip(LABEL_KEYS, [*(hashlib.sha256(image).hexdigest() for image in images), number]))
        return {"jpg_0": images[0], "jpg_1": images[1], "caption": captions[name], "label_0": 1.0, **keys}

    def write(file):
        numbered = list(enumerate(sorted(preferred)))
        schema = pa.Table.from_pylist([as_row(*numbered[0])]).schema
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(numbered), OWN_ROW_GROUP):
                rows = [as_row(*pair) for pair in numbered[start : start + OWN_ROW_GROUP]]
                writer.write_table(pa.Table.from_pylist(rows, schema))

    write_whole(path, write)


# ---- The run --------------------------------------------------------------------------------------------------------


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=MERGE_TIMEOUT)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    args.dtype = args.dtype or ("float32" if state.device.type == "cpu" else "float16")
    path = Path(args.output_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--output_path {path} cannot be written ({error}): name another file.") from error
    if args.pairs_from is not None:
        if state.is_main_process:
            write_own_pairs(Path(args.pairs_from), path)
        return
    shards, commit = open_data(args)
    folder, rows, source = start_run(shards, args)
    found = score_data_set(rows, shards, source, folder, args)
    labels, metadata = make_labels(found, rows, source, commit, args)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    write_labels(labels, path)
    report(labels, metadata)
    if args.push_to_hub:
        upload(path, metadata, args)
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):  # of other runs
        folder.parent.rmdir()


if __name__ == "__main__":
    with short_errors():
        main(ARGS)
