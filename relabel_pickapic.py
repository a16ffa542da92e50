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
#     "accelerate>=1.7.0",
#     "datasets>=3.6.0",
#     "pyarrow>=17.0",
#     "pillow>=10.1",
#     "matplotlib",
# ]
# ///
"""Scores preference pairs with reward models, once, and writes the soft preference of each into a small Parquet file.

    accelerate launch relabel_pickapic.py --dataset_name PICKAPIC_V2 --split train --output_path labels.parquet

The reward is the cosine between the image's and the caption's embedding (PickScore, https://arxiv.org/abs/2305.01569,
or any CLIP-style model), without the model's logit scale. Over all scored images it is brought to [0, 1],

    r' = (r - min) / (max - min)

and the soft preference of a pair, alpha / gamma in SmPO-Diffusion (https://arxiv.org/abs/2506.02698), is

    soft_label_0 = exp(r'_0) / (exp(r'_0) + exp(r'_1)) = sigmoid(r'_0 - r'_1)

With several reward models r' is the weighted mean of theirs (`--reward_weights`).

The file has one row for each row of the data set, in its order, and no images: the keys of the pair (`image_0_uid`,
`image_1_uid`, `ranking_id`), the human `label_0`, the raw `score_0` and `score_1` (of several models `score_0_NAME` and
`score_1_NAME`), `soft_label_0`, `valid` and, where that is false, `invalid_reason`. The metadata of the file say, as JSON
under the key `smpo_labels`, which model at which revision scored what, the ranges, and the counts. A picture beside it
shows how the score gaps and the soft labels are distributed.

Published labels for Pick-a-Pic v2 used the range 0.11543526500463486 to 0.28201571106910706: give it with --score_min
and --score_max for labels that do not depend on the subset at hand.

How a large data set is gone through: each (image, caption) is scored where it first occurs, each caption embedded once.
The rows are cut into pieces of 1,024, the pieces dealt to the processes, and each finished piece is written whole into a
folder beside the output (labels.scores). The same command, started again after whatever stopped it, goes on with the
pieces that are missing, with any number of processes, and ends with the same file. Several machines have to share the
folder. When the labels are written, it is removed; --scores_from makes other labels from the raw scores in a labels file.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import load_dataset, load_dataset_builder, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


logger = get_logger(__name__)

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore was tuned from this CLIP
LABEL_KEYS = ["image_0_uid", "image_1_uid", "ranking_id"]  # the columns of a labels file that name a pair
PIECE_ROWS = 1024  # what a stopped run has to score again, at most
CAPTION_CHUNK = 1024  # captions that are embedded, and kept, together
REASONS = ["no caption", "not a readable image", "not finite"]  # why a pair has no label, as parts of `invalid_reason`
READ_ROWS = 16  # rows read from a file at a time
READ_BUFFER = 8 * 2**20  # bytes fetched of one column at a time
NUM_READERS = 16  # threads that read what is small of many files
ARROW_SHARD_ROWS = 16 * PIECE_ROWS  # what counts as a shard where data lie in no Parquet files
LABELS_ROW_GROUP = 65_536  # rows; a reader of few rows goes by the page index
COPY_ROW_GROUP = 256  # rows with images, some 90 MB in Pick-a-Pic
MERGE_TIMEOUT = timedelta(days=7)  # how long a process waits at the end for a slower one


# ---------------------------------------------------------------------------------------------------------------------
# The maths
# ---------------------------------------------------------------------------------------------------------------------


def soft_label(score_0, score_1, score_min, score_max, weights=1.0):
    """P(image 0 is preferred), alpha / gamma of SmPO-Diffusion seen from image 0.

    `sigmoid(r'_0 - r'_1)` with `r' = (score - score_min) / (score_max - score_min)`: the softmax over the two scores after
    global min-max normalisation. Scores outside of the range are not clamped. With K rewards r' is the weighted mean of
    theirs.

    Args:
        score_0, score_1: raw rewards of the two images: numbers or arrays `[P]`, of K rewards `[K, P]`; NaN gives NaN.
        score_min, score_max: the range of the raw reward over all scored images, of K rewards `[K]`.
        weights: of K rewards `[K]`, not negative; their sum does not matter. Equal by default.

    Returns:
        float64 tensor in (0, 1), a scalar or `[P]`.

    Raises:
        ValueError: a range is empty or not finite, or the weights are negative or all zero.

    >>> soft_label([0.24, 0.21], [0.22, 0.21], score_min=0.12, score_max=0.28)  # gaps of 0.02 / 0.16 and 0
    tensor([0.5312, 0.5000], dtype=torch.float64)
    >>> soft_label([[0.24], [0.9]], [[0.22], [0.5]], [0.12, 0.0], [0.28, 1.0])  # two rewards, gaps of 0.125 and 0.4
    tensor([0.5653], dtype=torch.float64)
    """
    score_min, score_max, weights = np.broadcast_arrays(*(np.float64(v) for v in (score_min, score_max, weights)))
    if not (np.isfinite(score_min) & np.isfinite(score_max) & (score_min < score_max)).all():
        raise ValueError(f"score_min must be less than score_max, got {score_min} and {score_max}.")
    if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise ValueError(f"weights must not be negative, and one must be positive, got {weights}.")
    score_0, score_1 = (torch.as_tensor(score, dtype=torch.float64) for score in (score_0, score_1))
    scale = torch.as_tensor(weights / weights.sum() / (score_max - score_min))
    gap = score_0 - score_1
    return torch.sigmoid(torch.tensordot(scale, gap, dims=1) if scale.ndim else scale * gap)


def first_places(*keys):
    """For each of N places the first one with the same keys.

    Args:
        keys: integer arrays `[N]`; places are the same if they agree in all of them.

    Returns:
        int64 `[N]`, indices of places.

    >>> first_places(np.array([7, 7, 8, 7]), np.array([0, 1, 0, 0]))  # the fourth is the first again
    array([0, 1, 2, 0])
    """
    code = np.zeros(len(keys[0]), dtype=np.int64)
    for key in keys:
        values, codes = np.unique(key, return_inverse=True)
        code = np.unique(code * len(values) + codes, return_inverse=True)[1]
    return np.unique(code, return_index=True)[1][code]


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Writes the soft preference of each pair of a data set.")

    group = parser.add_argument_group("data", "Give one of --dataset_name and --scores_from.")
    group.add_argument(
        "--dataset_name",
        help="Data set: a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", "--split", default="train", help="Split of the data set.")
    group.add_argument(
        "--streaming",
        action="store_true",
        help="Read a data set on the Hub in place; otherwise it is downloaded first.",
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
    group.add_argument("--cache_dir", help="Where downloaded models and data are kept.")
    group.add_argument(
        "--scores_from",
        help="Labels file whose raw scores to take: new ranges or weights need neither data set nor model.",
    )

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
        "--reward_weights", type=float, nargs="+", help="Weight of each reward in the label. Default: all equal."
    )
    group.add_argument(
        "--score_min",
        type=float,
        nargs="+",
        help="Lower end of each reward's range. Default: the lowest score found. Needs --score_max.",
    )
    group.add_argument(
        "--score_max",
        type=float,
        nargs="+",
        help="Upper end of each reward's range. Default: the highest score found. Needs --score_min.",
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Precision of the models. Default: float16 on an accelerator, float32 on a CPU.",
    )
    group.add_argument(
        "--batch_size", type=int, default=128, help="Images or captions at a time; halved when they do not fit."
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        help="Processes that decode images. Default: the machine's cores, shared out to its processes.",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output_path", required=True, help="Parquet file to write. It must not exist.")
    group.add_argument(
        "--with_images",
        metavar="FOLDER",
        help="Also write a full copy of the data set, scores and labels added, as Parquet files into this folder.",
    )
    group.add_argument("--push_to_hub", action="store_true", help="Upload what was written to a data set repository.")
    group.add_argument("--hub_token", help="Token for the Hub; better kept in `hf auth login`.")
    group.add_argument("--hub_dataset_id", help="Repository to upload to. Default: the name of --output_path.")

    args = parser.parse_args(input_args)
    validate_args(args, parser.get_default)
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


def validate_args(args, default_of):
    """Fills in the defaults that depend on other flags, and turns --reward_model into `{name: path}`.

    Raises:
        ValueError: with every problem that the flags alone show, one a line, before anything is loaded.
    """
    problems = []
    path = Path(args.output_path)
    if path.suffix != ".parquet":
        problems.append(f"--output_path must end in .parquet, got {path}.")
    elif path.exists():
        problems.append(f"--output_path {path} exists: move it away, or write another file.")
    if (args.dataset_name is None) == (args.scores_from is None):
        problems.append("Give the pairs with one of --dataset_name and --scores_from.")
    if args.scores_from is not None:
        if not Path(args.scores_from).is_file():
            problems.append(f"--scores_from {args.scores_from} is not a file: give one that this script has written.")
        for name in (
            "dataset_config_name", "dataset_split_name", "streaming", "image_0_column", "image_1_column",
            "caption_column", "image_0_uid_column", "image_1_uid_column", "ranking_id_column", "human_label_column",
            "cache_dir", "reward_model", "reward_model_revision", "reward_processor", "dtype", "dataloader_num_workers",
            "batch_size", "with_images",
        ):  # fmt: skip
            if getattr(args, name) != default_of(name):
                problems.append(
                    f"--{name} has no meaning with --scores_from, where nothing is read or scored: leave it out."
                )
    if args.batch_size <= 0:
        problems.append(f"--batch_size must be positive, got {args.batch_size}.")
    if (args.dataloader_num_workers or 0) < 0:
        problems.append(f"--dataloader_num_workers must not be negative, got {args.dataloader_num_workers}.")
    if args.with_images is not None and Path(args.with_images).exists() and not Path(args.with_images).is_dir():
        problems.append(f"--with_images {args.with_images} is not a folder.")
    if (args.hub_token or args.hub_dataset_id) and not args.push_to_hub:
        problems.append("--hub_token and --hub_dataset_id do nothing without --push_to_hub.")

    args.reward_model = named_sources(args.reward_model, "reward_model", [], problems)
    count = len(args.reward_model)
    for name in ("reward_model_revision", "reward_processor", "reward_weights", "score_min", "score_max"):
        values = getattr(args, name)
        if values is not None and args.scores_from is None and len(values) != count:
            problems.append(f"--{name} has {len(values)} values for {count} reward models: give one for each.")
    if (args.score_min is None) != (args.score_max is None):
        problems.append("--score_min and --score_max need each other: give both or neither.")
    for low, high in zip(args.score_min or [], args.score_max or []):
        if not -math.inf < low < high < math.inf:
            problems.append(f"--score_min {low} must be less than --score_max {high}, and both finite.")
    for weight in args.reward_weights or []:
        if not 0 <= weight < math.inf:
            problems.append(f"--reward_weights must be finite and not negative, got {weight}.")
    if args.reward_weights is not None and not any(args.reward_weights):
        problems.append("--reward_weights are all zero: one must be positive.")
    if problems:
        raise ValueError("\n".join(problems))

    if args.reward_processor is None:
        paths = args.reward_model.values()
        args.reward_processor = [PICKSCORE_PROCESSOR if path == PICKSCORE else path for path in paths]
    if args.reward_model_revision is None:
        args.reward_model_revision = [None] * count


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


class DatasetShards:
    """Rows of a `datasets.Dataset` with the interface of `ParquetShards`."""

    def __init__(self, data, name):
        self.data = data.with_format("arrow")
        self.column_names, self.schema = data.column_names, data.features.arrow_schema
        starts = range(0, len(data), ARROW_SHARD_ROWS)
        self.files = [f"{name}-{start}" for start in starts]
        self.row_groups = [[min(ARROW_SHARD_ROWS, len(data) - start)] for start in starts]

    def read(self, shard, columns, first_row=0):
        data, first = self.data.select_columns(columns), shard * ARROW_SHARD_ROWS
        for start in range(first + first_row, first + self.row_groups[shard][0], READ_ROWS):
            yield from data[start : min(start + READ_ROWS, first + self.row_groups[shard][0])].to_batches()

    def read_columns(self, columns):
        return self.data.select_columns(columns)[:].replace_schema_metadata()


def open_shards(args):
    """The data set of the command line, its columns checked.

    Raises:
        ValueError: it cannot be read, a column is missing, captions are not texts, or --streaming does not apply.
    """
    source = (args.dataset_name, args.dataset_config_name, args.dataset_split_name)
    files = find_parquet(*source, args.streaming, args.cache_dir)
    if files is not None:
        shards = ParquetShards(files)
    elif args.streaming:
        raise ValueError(
            f"--streaming reads Parquet files in place, and --dataset_name {args.dataset_name} has none of the split"
            f" {args.dataset_split_name}: leave it out."
        )
    else:
        shards = DatasetShards(load_data(*source, args.cache_dir), args.dataset_split_name)
    required = ("image_0_column", "image_1_column", "caption_column", "image_0_uid_column", "image_1_uid_column")
    require_columns(shards.column_names, {name: getattr(args, name) for name in required})

    def is_text(kind):
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def is_image(kind):
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)

    def is_number(kind):
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)

    images = (is_image, "encoded images")
    fitting = {"caption_column": (is_text, "texts"), "image_0_column": images, "image_1_column": images}
    if args.human_label_column in shards.column_names:
        fitting["human_label_column"] = (is_number, "numbers")
    for name, (fits, what) in fitting.items():
        kind = shards.schema.field(getattr(args, name)).type
        if not fits(kind):
            raise ValueError(f"--{name} {getattr(args, name)} holds {kind}, not {what}: name the right one.")
    own = [name for name in added_columns(args.reward_model) if name in shards.column_names]
    if args.with_images is not None and own:
        raise ValueError(f"--with_images adds the column {own[0]}, which the data set has already.")
    return shards


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


class ImageTasks(torch.utils.data.Dataset):
    """Maps a task of `read_tasks`, which carries the encoded images, to what the reward models take.

    A look-up returns a dict: `piece` and `first_row` of the task; `hashes` of the bytes, int64 `[R, 2]`; `problems`,
    `{(row, side): text}` of the images that cannot be read; `places`, int64 `[k]`, 2 row + side of the k others that are to
    be scored, rows counted in the piece; `pixels`, for each processor `[k, 3, H, W]`.
    """

    def __init__(self, processors, dtype):
        self.processors, self.dtype = processors, dtype

    def __getitem__(self, task):
        piece, first_row, images, scored = task
        hashes, problems, places, pixels = np.zeros((len(images), 2), dtype=np.int64), {}, [], []
        for i, side in np.ndindex(len(images), 2):
            hashes[i, side] = hash_of(images[i][side])
            if not scored[i, side]:
                continue
            try:
                image = decode_image(images[i][side])
            except ValueError as error:
                problems[first_row + i, side] = str(error)
                continue
            places.append(2 * (first_row + i) + side)
            pixels.append(
                [p(images=image, return_tensors="pt")["pixel_values"][0].to(self.dtype) for p in self.processors]
            )
        return {
            "piece": piece,
            "first_row": first_row,
            "hashes": hashes,
            "problems": problems,
            "places": np.array(places, dtype=np.int64),
            "pixels": [torch.stack(batch) for batch in zip(*pixels)],
        }


def hash_of(data):
    """64-bit hash of an encoded image, or of the `{"bytes", "path"}` that a `datasets.Image` column holds."""
    if isinstance(data, dict):
        data = data["bytes"] if data["bytes"] is not None else str(data["path"]).encode()
    return int.from_bytes(hashlib.blake2b(data or b"", digest_size=8).digest(), "little", signed=True)


def read_tasks(shards, pieces, scored, args):
    """Reads pieces one after the other and yields `(piece, first row in it, [(image 0, image 1)], scored [R, 2])`.

    A file that breaks off is logged, and what can be read after it is read.

    Args:
        scored: bool `[P, 2]`, which images of the data set are to be scored.
    """
    columns = [args.image_0_column, args.image_1_column]
    # What stands together in a file is read in one go.
    stretches = itertools.groupby(enumerate(pieces), key=lambda item: (item[1].shard, item[1].number - item[0]))
    for (shard, _), stretch in stretches:
        stretch = deque(piece for _, piece in stretch)
        row = stretch[0].first_row
        try:
            for batch in shards.read(shard, columns, row):
                images = list(zip(*(batch.column(name).to_pylist() for name in columns)))
                while images and stretch:
                    piece = stretch[0]
                    first = row - piece.first_row
                    part, images = images[: piece.num_rows - first], images[piece.num_rows - first :]
                    yield piece, first, part, scored[piece.start + first : piece.start + first + len(part)]
                    row += len(part)
                    if row == piece.first_row + piece.num_rows:
                        stretch.popleft()
                if not stretch:
                    break
        except (OSError, pa.ArrowException) as error:
            logger.error(f"{shards.files[shard]} breaks off after row {row}: {error}", main_process_only=False)


# ---------------------------------------------------------------------------------------------------------------------
# Reward models
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


class Batches:
    """Runs models on batches of at most `size`, which is halved whenever one does not fit into memory."""

    def __init__(self, size):
        self.size = size

    def __call__(self, embed, inputs):
        """`embed` of a tensor or a list, in as many batches as it takes."""
        done = []
        while sum(map(len, done)) < len(inputs):
            start = sum(map(len, done))
            try:
                done.append(embed(inputs[start : start + self.size]))
            except RuntimeError as error:
                if self.size == 1 or not should_reduce_batch_size(error):
                    raise
                self.size //= 2
                clear_device_cache(garbage_collection=True)
                logger.warning(f"Out of memory: going on with --batch_size {self.size}.", main_process_only=False)
        return torch.cat(done)


class CaptionEmbeddings:
    """Embeddings of the captions under one reward model, made `CAPTION_CHUNK` at a time when first asked for.

    Chunks are kept in a folder, where other processes and a later run find them.
    """

    def __init__(self, captions, reward, folder, batches):
        self.captions, self.reward, self.folder, self.batches = captions, reward, folder, batches
        self.chunks = {}

    def __call__(self, caption_ids):
        """fp32 `[N, D]` of N numbers of captions."""
        rows = [self.chunk(i // CAPTION_CHUNK)[i % CAPTION_CHUNK] for i in caption_ids.tolist()]
        return torch.from_numpy(np.stack(rows)).to(self.reward.model.device)

    def chunk(self, number):
        if number not in self.chunks:
            path = self.folder / f"captions-{self.reward.name}-{number:05d}.npy"
            if not path.exists():
                captions = self.captions[number * CAPTION_CHUNK : (number + 1) * CAPTION_CHUNK].to_pylist()
                embed = functools.partial(embed_texts, self.reward.model, self.reward.processor)
                embeddings = self.batches(embed, captions).cpu().numpy()
                data = io.BytesIO()  # numpy does not notice when a file takes only a part
                np.save(data, embeddings)
                write_whole(path, lambda file: file.write(data.getbuffer()))
            self.chunks[number] = np.load(path, mmap_mode="r")
        return self.chunks[number]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring, piece by piece
# ---------------------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Up to `PIECE_ROWS` consecutive rows of a shard, which are scored and kept together."""

    number: int
    shard: int
    first_row: int  # in the shard
    num_rows: int
    start: int  # in the data set


def cut_pieces(row_groups):
    """The pieces of shards of which the rows of each row group are given, in the order of the rows."""
    pieces, start = [], 0
    for shard, groups in enumerate(row_groups):
        for first_row in range(0, sum(groups), PIECE_ROWS):
            num_rows = min(PIECE_ROWS, sum(groups) - first_row)
            pieces.append(Piece(len(pieces), shard, first_row, num_rows, start))
            start += num_rows
    return pieces


def sync_to_disk(*paths):
    """Returns when files and folders are on the disk and not only in the system's memory."""
    if os.name == "nt":  # Windows does not open folders, nor sync what is open for reading
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_whole(path, write):
    """Writes a file under a temporary name, syncs it to the disk and renames it: it is there whole or not at all.

    Args:
        write: called with the open file.

    Raises:
        OSError: it cannot be written, the disk is full, for one.
    """
    temporary = path.with_name(f".{path.name}.{PartialState().process_index}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written: {error}. What was finished before is kept: make room, and start the same command"
            " again."
        ) from error


def start_run(folder, shards, args):
    """Makes the folder of a run, or finds that it holds this one.

    Returns:
        Table of P rows: the keys and human labels, `caption_id` (-1 without a caption), `first_0` and `first_1`, the first
        place, 2 row + side, with the same uid and caption; the captions, a column of texts.

    Raises:
        ValueError: the folder holds another run, or the data set has no captions.
    """
    record = {
        "files": [[Path(name).name, sum(groups)] for name, groups in zip(shards.files, shards.row_groups)],
        "reward_model": args.reward_model,
        "reward_model_revision": args.reward_model_revision,
        "reward_processor": args.reward_processor,
        "dtype": args.dtype,
        "piece_rows": PIECE_ROWS,
        **{name: value for name, value in vars(args).items() if name.endswith("_column")},
    }
    record_path, plan_path, captions_path = (
        folder / name for name in ("run.json", "plan.parquet", "captions.parquet")
    )
    if record_path.exists():
        saved = json.loads(record_path.read_text())
        changes = [
            f"{name}: {saved.get(name)} then, {value} now"
            for name, value in record.items()
            if saved.get(name) != value
        ]
        if changes:
            listed = "\n".join(changes)
            raise ValueError(
                f"{folder} holds the scores of another run:\n{listed}\nGo on with what it was started with, delete it, or"
                " give another --output_path."
            )
        logger.info(f"Going on with the run in {folder}.")
    elif PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        plan, captions = make_plan(shards, args)
        write_whole(plan_path, lambda file: pq.write_table(plan, file))
        write_whole(captions_path, lambda file: pq.write_table(pa.table({"caption": captions}), file))
        write_whole(record_path, lambda file: file.write(json.dumps(record, indent=2).encode()))
    PartialState().wait_for_everyone()
    return pq.read_table(plan_path), pq.read_table(captions_path)["caption"].combine_chunks()


def make_plan(shards, args):
    """What `start_run` returns, from the key columns of all rows."""
    columns = dict(zip(LABEL_KEYS, (args.image_0_uid_column, args.image_1_uid_column, args.ranking_id_column)))
    columns["label_0"] = args.human_label_column
    columns = {name: column for name, column in columns.items() if column in shards.column_names}
    keys = shards.read_columns([*dict.fromkeys([*columns.values(), args.caption_column])])
    captions = pc.dictionary_encode(pc.cast(keys[args.caption_column], pa.large_string()).combine_chunks())
    if not len(captions.dictionary):
        raise ValueError(f"--caption_column {args.caption_column} of {args.dataset_name} holds no captions.")
    caption_ids = pc.fill_null(captions.indices, -1).to_numpy()

    uids = [pc.cast(keys[columns[key]], pa.large_string()).combine_chunks() for key in LABEL_KEYS[:2]]
    uids = pc.dictionary_encode(pa.concat_arrays(uids))
    uids = pc.fill_null(uids.indices, -1).to_numpy().astype(np.int64).reshape(2, -1).T.ravel()
    uids = np.where(uids < 0, -1 - np.arange(len(uids)), uids)  # no uid: an image of its own
    first = first_places(uids, np.repeat(caption_ids, 2)).reshape(-1, 2)
    plan = {name: keys[column] for name, column in columns.items()}
    plan.update(caption_id=caption_ids, first_0=first[:, 0], first_1=first[:, 1])
    return pa.table(plan), captions.dictionary


def score_pieces(prefix, shards, pieces, scored, caption_ids, captions, folder, args):
    """Scores this process's share of what is not yet in the folder; each piece is written when it is finished.

    Args:
        prefix: of the files' names.
        pieces: those that have something to score.
        scored: bool `[P, 2]`, which images of the data set are to be scored.
        caption_ids: int `[P]`, numbers of `captions`.
    """
    state = PartialState()
    share = [len(pieces) * i // state.num_processes for i in (state.process_index, state.process_index + 1)]
    missing = [piece for piece in pieces[slice(*share)] if not piece_path(folder, prefix, piece).exists()]
    if not missing:
        return
    dtype = getattr(torch, args.dtype)
    rewards, image_processors = load_rewards(state.device, dtype, args)
    batches = Batches(args.batch_size)
    embeddings = [CaptionEmbeddings(captions, reward, folder, batches) for reward in rewards]
    num_workers = args.dataloader_num_workers
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = torch.utils.data.DataLoader(
        ImageTasks(image_processors, dtype),
        batch_size=None,
        sampler=read_tasks(shards, missing, scored, args),
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=state.device.type == "cuda",
    )
    progress = Progress(sum(piece.num_rows for piece in missing))
    for piece, results in itertools.groupby(progress.waiting_for(loader), key=lambda result: result["piece"]):
        rows = slice(piece.start, piece.start + piece.num_rows)
        table = score_piece(piece, results, rewards, embeddings, caption_ids[rows], batches)
        if table is not None:
            write_whole(piece_path(folder, prefix, piece), lambda file: pq.write_table(table, file))
            progress.update(piece.num_rows, int(scored[rows].sum()))
    progress.close()


def as_it_is(result):
    """Instead of PyTorch's conversion of everything to tensors."""
    return result


def piece_path(folder, prefix, piece):
    return folder / f"{prefix}-{piece.number:06d}.parquet"


def score_piece(piece, results, rewards, embeddings, caption_ids, batches):
    """Scores what the look-ups of `ImageTasks` for one piece hold.

    Batches never hold images of two pieces, so that a score does not depend on where an earlier run was stopped.

    Returns:
        Table of R rows with `hash_SIDE`, `problem_SIDE` and, for each reward, `score_SIDE_NAME`, NaN where nothing was scored;
        None if some rows are missing.
    """
    hashes, num_rows = np.zeros((piece.num_rows, 2), dtype=np.int64), 0
    problems, places, scores, pending = {}, [], [], []

    def score_pending():
        if pending:
            places.append(np.concatenate([result["places"] for result in pending]))
            pixels = [torch.cat(parts) for parts in zip(*(result["pixels"] for result in pending))]
            scores.append(score_images(pixels, caption_ids[places[-1] // 2], rewards, embeddings, batches))
            pending.clear()

    for result in results:
        first, count = result["first_row"], len(result["hashes"])
        hashes[first : first + count] = result["hashes"]
        problems.update(result["problems"])
        num_rows += count
        if len(result["places"]):
            pending.append(result)
        if sum(len(result["places"]) for result in pending) > batches.size - 2 * READ_ROWS:
            score_pending()
    score_pending()
    if num_rows < piece.num_rows:
        return None
    table = {}
    values = np.full((piece.num_rows, 2, len(rewards)), np.nan, dtype=np.float32)
    if places:
        values.reshape(-1, len(rewards))[np.concatenate(places)] = torch.cat(scores).cpu().numpy()
    for side in (0, 1):
        table[f"hash_{side}"] = hashes[:, side]
        table[f"problem_{side}"] = pa.array([problems.get((row, side)) for row in range(num_rows)], pa.string())
        for k, reward in enumerate(rewards):
            table[f"score_{side}_{reward.name}"] = values[:, side, k]
    revisions = {reward.name: getattr(reward.model.config, "_commit_hash", None) for reward in rewards}
    return pa.table(table).replace_schema_metadata({"revisions": json.dumps(revisions)})


def score_images(pixels, caption_ids, rewards, embeddings, batches):
    """Cosines of N images with their captions, `[N, K]` for K rewards, on the models' device.

    Args:
        pixels: `[N, 3, H, W]` for each of the distinct image processors.
        caption_ids: int `[N]`.
    """
    scores = []
    for reward, embedding in zip(rewards, embeddings):
        images = batches(functools.partial(embed_images, reward.model), pixels[reward.pixels])
        scores.append((images * embedding(caption_ids)).sum(-1))
    return torch.stack(scores, dim=1)


class Progress:
    """A bar over rows that also knows how many images were scored for them, and how long that waited for decoded images."""

    def __init__(self, num_rows):
        disable = not PartialState().is_local_main_process
        self.bar = tqdm(total=num_rows, desc="Rows", unit="row", disable=disable)
        self.started, self.rows, self.images, self.waited = time.perf_counter(), 0, 0, 0.0

    def waiting_for(self, iterable):
        """The items of an iterable; the time that it takes to make them is what `waited` counts."""
        iterator, end = iter(iterable), object()
        while True:
            started = time.perf_counter()
            item = next(iterator, end)
            self.waited += time.perf_counter() - started
            if item is end:
                return
            yield item

    def update(self, num_rows, num_images):
        self.rows, self.images = self.rows + num_rows, self.images + num_images
        self.bar.update(num_rows)
        self.bar.set_postfix(self.figures())

    def figures(self):
        seconds = time.perf_counter() - self.started
        return {
            "images/s": f"{self.images / seconds:.1f}",
            "known": f"{1 - self.images / max(1, 2 * self.rows):.0%}",
            "waiting": f"{self.waited / seconds:.0%}",
        }

    def close(self):
        self.bar.close()
        figures = self.figures()
        logger.info(
            f"{self.rows} rows in {time.perf_counter() - self.started:.1f} s: {self.images} images scored,"
            f" {figures['images/s']} a second; {figures['known']} of the images were known from other rows;"
            f" {figures['waiting']} of the time went by waiting for decoded images."
        )


def gather_pieces(prefix, pieces, shards, num_rows, folder, args):
    """What pieces hold, put together for all P rows: hashes `[2 P]`, scores `[2 P, K]`, `{place: problem}`, revisions.

    Raises:
        ValueError: pieces are missing, or were scored by models of different revisions.
    """
    missing = [shards.files[piece.shard] for piece in pieces if not piece_path(folder, prefix, piece).exists()]
    if missing:
        listed = "\n".join(dict.fromkeys(missing))
        raise ValueError(
            f"Files that could not be read to the end, see above:\n{listed}\nAll else is scored and kept in {folder}: fetch"
            " them again, and start the same command again."
        )
    hashes, problems, revisions = np.zeros((num_rows, 2), dtype=np.int64), {}, set()
    scores = np.full((num_rows, 2, len(args.reward_model)), np.nan, dtype=np.float32)
    for piece in pieces:
        table = pq.read_table(piece_path(folder, prefix, piece))
        rows = slice(piece.start, piece.start + piece.num_rows)
        revisions.add(table.schema.metadata[b"revisions"].decode())
        for side in (0, 1):
            hashes[rows, side] = table[f"hash_{side}"].to_numpy()
            for row, text in enumerate(table[f"problem_{side}"].to_pylist()):
                if text is not None:
                    problems[2 * (piece.start + row) + side] = text
            for k, name in enumerate(args.reward_model):
                scores[rows, side, k] = table[f"score_{side}_{name}"].to_numpy()
    if len(revisions) > 1:
        raise ValueError(
            f"The pieces in {folder} were scored by different revisions of the reward models: {', '.join(sorted(revisions))}."
            " Delete it and pin one with --reward_model_revision."
        )
    return hashes.ravel(), scores.reshape(2 * num_rows, -1), problems, json.loads(next(iter(revisions), "{}"))


def score_data_set(shards, folder, args):
    """Scores all images of a data set of P pairs under K rewards.

    An image is known by its place, 2 row + side. A place has the score of the first place with the same uid and caption,
    and is scored by itself if other bytes stand there.

    Returns:
        Table of the keys and human labels; scores, float32 `[P, 2, K]`, NaN where there is none; why there is none, text or
        None `[P]`; the reward models' commits on the Hub, `{name: commit or None}`.

    Raises:
        ValueError: see `start_run`, `load_rewards`, `gather_pieces`.
    """
    plan, captions = start_run(folder, shards, args)
    pieces = cut_pieces(shards.row_groups)
    caption_ids = plan["caption_id"].to_numpy()
    places = np.arange(2 * len(plan))
    has_caption = np.repeat(caption_ids >= 0, 2)
    first = np.stack([plan["first_0"], plan["first_1"]], axis=1).ravel()  # the place whose score a place has

    def score(prefix, pieces, scored):
        score_pieces(prefix, shards, pieces, scored.reshape(-1, 2), caption_ids, captions, folder, args)
        PartialState().wait_for_everyone()
        return gather_pieces(prefix, pieces, shards, len(plan), folder, args)

    hashes, scores, problems, commits = score("piece", pieces, (first == places) & has_caption)
    other = has_caption & (hashes != hashes[first])
    if other.any():
        logger.warning(
            f"{other.sum()} images have the uid and caption of another image but not its bytes: they are scored by themselves."
        )
        first[other] = np.flatnonzero(other)[first_places(hashes[other], np.repeat(caption_ids, 2)[other])]
        few = [piece for piece in pieces if other[2 * piece.start : 2 * (piece.start + piece.num_rows)].any()]
        _, more_scores, more_problems, _ = score("again", few, (first == places) & other)
        scores = np.where(np.isnan(scores), more_scores, scores)
        problems.update(more_problems)

    texts = ["the score is not finite"]
    problem = np.where(has_caption & ~np.isfinite(scores).all(axis=1), 0, -1)
    for place, text in problems.items():
        problem[place] = len(texts)
        texts.append(text)
    problem = problem[first].reshape(-1, 2)
    reasons = np.where(caption_ids < 0, "no caption", None)
    for row in np.flatnonzero((problem >= 0).any(axis=1) & (caption_ids >= 0)):
        reasons[row] = "; ".join(
            f"image {side}: {texts[problem[row, side]]}" for side in (0, 1) if problem[row, side] >= 0
        )
    scores = np.where(has_caption[:, None], scores[first], np.nan).reshape(len(plan), 2, -1)
    return plan.drop_columns(["caption_id", "first_0", "first_1"]), scores, reasons, commits


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def score_columns(names):
    """`{name: (column of image 0, column of image 1)}` in a labels file."""
    if len(names) == 1:
        return {name: ("score_0", "score_1") for name in names}
    return {name: (f"score_0_{name}", f"score_1_{name}") for name in names}


def added_columns(names):
    """The columns of a labels file that a data set lacks, for reward models of these names."""
    scores = itertools.chain.from_iterable(score_columns(names).values())
    return [*scores, "soft_label_0", "valid", "invalid_reason"]


def raw_labels(keys, scores, reasons, commits, args):
    """Table of keys and raw scores, everything of a labels file but the soft label, and its metadata.

    Args:
        keys, scores, reasons, commits: from `score_data_set`.
    """
    table = {name: keys[name] for name in keys.column_names}
    for k, columns in enumerate(score_columns(args.reward_model).values()):
        for side, column in enumerate(columns):
            table[column] = pa.array(scores[:, side, k], pa.float32(), mask=~np.isfinite(scores[:, side, k]))
    table["valid"] = pa.array([reason is None for reason in reasons], pa.bool_())
    table["invalid_reason"] = pa.array(reasons, pa.string())
    rewards = zip(args.reward_model.items(), args.reward_model_revision, args.reward_processor)
    metadata = {
        "rewards": [
            {"name": name, "reward_model": path, "revision": commits[name] or revision, "reward_processor": processor}
            for (name, path), revision, processor in rewards
        ],
        "dtype": args.dtype,
        "dataset_name": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "dataset_split_name": args.dataset_split_name,
        "num_rows": len(reasons),
        "transformers": transformers.__version__,
    }
    return pa.table(table), metadata


def read_raw_labels(args):
    """What `raw_labels` returns, from the labels file --scores_from.

    Raises:
        ValueError: it is none, or --score_min, --score_max or --reward_weights do not fit its rewards.
    """
    path = args.scores_from
    with loading("scores_from", path, "a labels file of this script"):
        table = pq.read_table(path)
        metadata = json.loads((table.schema.metadata or {}).get(b"smpo_labels", b"{}"))
        if "rewards" not in metadata:
            raise ValueError(f"its metadata lack smpo_labels, its columns are {', '.join(table.column_names)}")
    count = len(metadata["rewards"])
    for name in ("reward_weights", "score_min", "score_max"):
        if getattr(args, name) is not None and len(getattr(args, name)) != count:
            raise ValueError(
                f"--{name} has {len(getattr(args, name))} values, and {path} the scores of {count} reward models: give one"
                " for each."
            )
    return table.drop_columns(["soft_label_0"]), metadata


def add_soft_labels(table, metadata, args):
    """The labels file of raw scores: with `soft_label_0`, and all that led to it in its metadata.

    Raises:
        ValueError: there are not two different scores under a reward.
    """
    scores, ranges = [], []
    for k, (name, columns) in enumerate(score_columns([reward["name"] for reward in metadata["rewards"]]).items()):
        sides = [table[column].to_numpy(zero_copy_only=False).astype(np.float64) for column in columns]
        finite = np.concatenate(sides)[np.isfinite(np.concatenate(sides))]
        if not len(finite) or (args.score_min is None and finite.min() == finite.max()):
            reasons = pc.value_counts(table["invalid_reason"].drop_null()).to_pylist()[:3]
            raise ValueError(
                f"{len(finite)} of the {2 * len(table)} images were scored by {name}, with {len(set(finite))} different"
                f" scores: at least two are needed. Check --image_0_column and --image_1_column. Reasons: {reasons}."
            )
        scores.append(sides)
        low, high = (finite.min(), finite.max()) if args.score_min is None else (args.score_min[k], args.score_max[k])
        ranges.append((float(low), float(high)))
    weights = args.reward_weights or [1.0] * len(ranges)
    score_0, score_1 = np.stack(scores, axis=1)
    label = soft_label(score_0, score_1, *np.transpose(ranges), weights).numpy()
    label = pa.array(label.astype(np.float32), pa.float32(), mask=~np.isfinite(label))
    table = table.add_column(table.column_names.index("valid"), "soft_label_0", label)
    for reward, (low, high), weight in zip(metadata["rewards"], ranges, weights):
        reward.update(score_min=low, score_max=high, weight=weight / sum(weights))
    num_valid = pc.sum(table["valid"]).as_py()
    metadata.update(
        range_from="the scores" if args.score_min is None else "the command line",
        num_valid=num_valid,
        num_invalid=len(table) - num_valid,
        invalid={kind: pc.sum(pc.match_substring(table["invalid_reason"], kind)).as_py() or 0 for kind in REASONS},
    )
    return table.replace_schema_metadata({"smpo_labels": json.dumps(metadata)})


def write_copy(shards, labels, folder, args):
    """Writes the files of the data set again with the columns of the labels file that it lacks; this process's share of them.

    A file that is there already, with the same labels, is left as it is.

    Raises:
        ValueError: the folder has a file with other labels.
    """
    state = PartialState()
    added = labels.select(added_columns(args.reward_model))
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *map(sum, shards.row_groups)])
    numbers = range(state.process_index, len(shards.files), state.num_processes)
    for shard in tqdm(numbers, desc="Copies", unit="file", disable=not state.is_local_main_process):
        path = folder / f"{args.dataset_split_name}-{shard:05d}-of-{len(shards.files):05d}.parquet"
        if path.exists():
            if (pq.read_schema(path).metadata or {}).get(b"smpo_labels") == labels.schema.metadata[b"smpo_labels"]:
                continue
            raise ValueError(
                f"{path} exists, with other labels: move it away, or give another folder to --with_images."
            )
        write_whole(
            path,
            lambda file: copy_shard(shards, shard, added.slice(starts[shard], sum(shards.row_groups[shard])), file),
        )


def copy_shard(shards, shard, added, file):
    """Writes the rows of a shard, with columns added, as a Parquet file that `datasets` reads with its features."""
    batches, row, writer = shards.read(shard, shards.column_names), 0, None
    while some := list(itertools.islice(batches, COPY_ROW_GROUP // READ_ROWS)):
        table = pa.Table.from_batches(some)
        for name in added.column_names:
            table = table.append_column(name, added[name].slice(row, len(table)))
        row += len(table)
        if writer is None:
            features = datasets.Features.from_arrow_schema(table.schema)
            images = {name: datasets.Image() for name, kind in features.items() if isinstance(kind, datasets.Image)}
            schema = datasets.Features({**features, **images}).arrow_schema
            schema = schema.with_metadata({**schema.metadata, **added.schema.metadata})
            writer = pq.ParquetWriter(file, schema, write_page_index=True)
        writer.write_table(table.cast(schema))
    writer.close()


def report(labels, metadata, picture_path):
    """Logs and draws what is worth knowing of the labels before training on them."""
    label = labels["soft_label_0"].drop_null().to_numpy()
    logger.info(f"{metadata['num_valid']} of {len(labels)} pairs are labelled. Not labelled: {metadata['invalid']}.")
    strength = np.quantile(np.abs(2 * label - 1), [0.1, 0.5, 0.9])
    logger.info("|2 soft_label_0 - 1|, 10 %, median, 90 %: " + ", ".join(f"{value:.4f}" for value in strength))
    if "label_0" in labels.column_names:
        known = labels.filter(pc.and_(labels["valid"], pc.is_valid(labels["label_0"])))
        decided = known.filter(pc.not_equal(known["label_0"], 0.5))
        ties = known.filter(pc.equal(known["label_0"], 0.5))["soft_label_0"].to_numpy()
        agree = pc.equal(pc.greater(decided["soft_label_0"], 0.5), pc.greater(decided["label_0"], 0.5))
        if len(decided):
            logger.info(
                f"The label agrees with people on {pc.mean(agree).as_py():.1%} of {len(decided)} decided pairs."
            )
        if len(ties):
            logger.info(
                f"People called {len(ties)} pairs a tie; there |2 soft_label_0 - 1| is {np.median(np.abs(2 * ties - 1)):.4f}."
            )

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, columns in score_columns([reward["name"] for reward in metadata["rewards"]]).items():
        gap = pc.subtract(labels[columns[0]], labels[columns[1]]).drop_null().to_numpy()
        left.hist(gap, bins=61, histtype="step", label=name)
    left.set(title="Score gaps", xlabel="score of image 0 - score of image 1", ylabel="pairs")
    left.legend()
    right.hist(label, bins=61, color="tab:green")
    right.set(title=f"Soft labels of {len(label):,} pairs", xlabel="soft_label_0, P(image 0 is preferred)")
    write_whole(picture_path, lambda file: figure.savefig(file, format="png", dpi=120))


def upload(path, picture_path, metadata, args):
    """Uploads the labels, their picture, a data set card and, if there is one, the copy with images."""
    hub = HfApi(token=args.hub_token)
    repo_id = hub.create_repo(args.hub_dataset_id or path.stem, repo_type="dataset", exist_ok=True).repo_id
    repo = {"repo_id": repo_id, "repo_type": "dataset"}
    split = metadata["dataset_split_name"]
    data_files = [{"split": split, "path": f"data/{split}-*.parquet" if args.with_images else path.name}]
    card_data = DatasetCardData(
        tags=["smpo", "preference", "text-to-image"],
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    card = DatasetCard(
        f"---\n{card_data.to_yaml()}\n---\n\n# Soft preference labels\n\n`{path.name}`: P(image 0 is preferred) of each pair of"
        f" {metadata['dataset_name']}, split {split}, for SmPO-Diffusion (https://arxiv.org/abs/2506.02698).\n\n"
        f"![distribution]({picture_path.name})\n\n```json\n{json.dumps(metadata, indent=2)}\n```\n"
    )
    hub.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", **repo)
    for file in (path, picture_path):
        hub.upload_file(path_or_fileobj=file, path_in_repo=file.name, **repo)
    if args.with_images is not None:
        hub.upload_folder(folder_path=args.with_images, path_in_repo="data", **repo)
    logger.info(f"Uploaded to {repo_id}.")


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=MERGE_TIMEOUT)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    args.dtype = args.dtype or ("float32" if state.device.type == "cpu" else "float16")
    path = Path(args.output_path)
    folder, picture_path = path.with_suffix(".scores"), path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.scores_from is not None:
        labels, metadata = read_raw_labels(args)
        labels = add_soft_labels(labels, metadata, args)
    else:
        shards = open_shards(args)
        labels, metadata = raw_labels(*score_data_set(shards, folder, args), args)
        labels = add_soft_labels(labels, metadata, args)
        if args.with_images is not None:
            write_copy(shards, labels, Path(args.with_images), args)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    report(labels, metadata, picture_path)
    write_whole(
        path,
        lambda file: pq.write_table(
            labels, file, compression="zstd", row_group_size=LABELS_ROW_GROUP, write_page_index=True
        ),
    )
    shutil.rmtree(folder, ignore_errors=True)
    logger.info(f"{path}: {json.dumps(metadata, indent=2)}")
    if args.push_to_hub:
        upload(path, picture_path, metadata, args)


if __name__ == "__main__":
    main(parse_args())
