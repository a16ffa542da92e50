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
#     "torch",
#     "transformers>=4.55.0",
#     "datasets>=3.6.0",
#     "pyarrow>=17.0",
#     "pillow>=10.1",
# ]
# ///
"""Scores preference pairs with a reward model, once, and writes the soft preference of each into a small Parquet file.

    python relabel_pickapic.py --dataset_name PICKAPIC_V2 --split train --output_path labels.parquet

The reward is the cosine between the image's and the caption's embedding (PickScore, https://arxiv.org/abs/2305.01569,
or any CLIP-style model), without the model's logit scale. Over all scored images it is brought to [0, 1],

    r' = (r - min) / (max - min)

and the soft preference of a pair, alpha / gamma in SmPO-Diffusion (https://arxiv.org/abs/2506.02698), is

    soft_label_0 = exp(r'_0) / (exp(r'_0) + exp(r'_1)) = sigmoid(r'_0 - r'_1)

The file has one row for each row of the data set, in its order, and no images: the keys of the pair (`image_0_uid`,
`image_1_uid`, `ranking_id`), the human `label_0`, the raw `score_0` and `score_1`, `soft_label_0` and `valid`. An image
that cannot be read has a null score, and its pairs a null soft label. The metadata of the file say, as JSON under the
key `smpo_labels`, which model at which revision scored what, the range, and the counts.

Published labels for Pick-a-Pic v2 used the range 0.11543526500463486 to 0.28201571106910706: give it with --score_min
and --score_max for labels that do not depend on the subset at hand.
"""

import argparse
import io
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from datasets import load_dataset, load_from_disk
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


logger = logging.getLogger(__name__)

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore was tuned from this CLIP
LABEL_KEYS = ["image_0_uid", "image_1_uid", "ranking_id"]  # the columns of a labels file that name a pair


# ---------------------------------------------------------------------------------------------------------------------
# The maths
# ---------------------------------------------------------------------------------------------------------------------


def soft_label(score_0, score_1, score_min, score_max):
    """P(image 0 is preferred), alpha / gamma of SmPO-Diffusion seen from image 0.

    `sigmoid((score_0 - score_1) / (score_max - score_min))`: the softmax over the two scores after global min-max
    normalisation. Scores outside of the range are not clamped.

    Args:
        score_0, score_1: raw rewards of the two images, numbers or arrays `[P]`; NaN gives NaN.
        score_min, score_max: the range of the raw reward over all scored images.

    Returns:
        float64 tensor in (0, 1), a scalar or `[P]`.

    Raises:
        ValueError: the range is empty or not finite.
    """
    if not (np.isfinite(score_min) and np.isfinite(score_max) and score_min < score_max):
        raise ValueError(f"score_min must be less than score_max, got {score_min} and {score_max}.")
    score_0, score_1 = (torch.as_tensor(score, dtype=torch.float64) for score in (score_0, score_1))
    return torch.sigmoid((score_0 - score_1) / (score_max - score_min))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Writes the soft preference of each pair of a data set.")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        required=True,
        help="Data set: a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", "--split", default="train", help="Split of the data set.")
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

    group = parser.add_argument_group("reward model")
    group.add_argument(
        "--reward_model", default=PICKSCORE, help="CLIP-style model that scores: a Hub name or a folder."
    )
    group.add_argument("--reward_model_revision", help="Revision of the reward model on the Hub.")
    group.add_argument(
        "--reward_processor",
        help=f"Processor of the reward model. Default: the model's own; for PickScore {PICKSCORE_PROCESSOR}.",
    )
    group.add_argument(
        "--score_min", type=float, help="Lower end of the range. Default: the lowest score found. Needs --score_max."
    )
    group.add_argument(
        "--score_max", type=float, help="Upper end of the range. Default: the highest score found. Needs --score_min."
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where models run.")
    group.add_argument(
        "--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="Precision of the models."
    )
    group.add_argument("--batch_size", type=int, default=64, help="Images or captions at a time.")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that decode images.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_path", required=True, help="Parquet file to write. It must not exist.")

    args = parser.parse_args(input_args)
    validate_args(args)
    return args


def validate_args(args):
    """Checks the flags.

    Raises:
        ValueError: with every problem that the flags alone show, one a line, before anything is loaded.
    """
    problems = []
    if args.batch_size <= 0:
        problems.append(f"--batch_size must be positive, got {args.batch_size}.")
    if args.dataloader_num_workers < 0:
        problems.append(f"--dataloader_num_workers must not be negative, got {args.dataloader_num_workers}.")
    if (args.score_min is None) != (args.score_max is None):
        problems.append("--score_min and --score_max need each other: give both or neither.")
    elif args.score_min is not None and not args.score_min < args.score_max:
        problems.append(f"--score_min {args.score_min} must be less than --score_max {args.score_max}.")
    if not args.output_path.endswith(".parquet"):
        problems.append(f"--output_path must end in .parquet, got {args.output_path}.")
    elif Path(args.output_path).exists():
        problems.append(f"--output_path {args.output_path} exists: move it away, or write another file.")
    if problems:
        raise ValueError("\n".join(problems))
    if args.reward_processor is None:
        args.reward_processor = PICKSCORE_PROCESSOR if args.reward_model == PICKSCORE else args.reward_model


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
        raise ValueError(f"not a readable image ({type(error).__name__}: {error})") from error


class RewardImages(torch.utils.data.Dataset):
    """The images to score, ready for the reward model: `(i, pixel_values)`, or `(i, None)` if image i cannot be read."""

    def __init__(self, pairs, places, image_processor):
        self.pairs = pairs
        self.places = places
        self.image_processor = image_processor

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        row, column = self.places[i]
        try:
            image = decode_image(self.pairs[row][column])
        except ValueError as error:
            logger.warning(f"row {row}, column {column}: {error}")
            return i, None
        return i, self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def collate_images(examples):
    """Numbers of the images that can be read, and their pixels as one batch (None if there are none)."""
    examples = [(i, pixels) for i, pixels in examples if pixels is not None]
    return [i for i, _ in examples], torch.stack([pixels for _, pixels in examples]) if examples else None


# ---------------------------------------------------------------------------------------------------------------------
# Reward model
# ---------------------------------------------------------------------------------------------------------------------


def load_reward_model(args):
    """The reward model, frozen, on its device, and its processor.

    Raises:
        ValueError: a part cannot be loaded, or the model does not embed images and texts into one space.
    """
    source = {"revision": args.reward_model_revision, "cache_dir": args.cache_dir}
    with loading("reward_model", args.reward_model):
        model = AutoModel.from_pretrained(args.reward_model, **source)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"--reward_model {args.reward_model} is a {type(model).__name__}, not a CLIP-style model.")
    with loading("reward_processor", args.reward_processor):
        processor = AutoProcessor.from_pretrained(args.reward_processor, cache_dir=args.cache_dir)
    return model.requires_grad_(False).eval().to(args.device, getattr(torch, args.dtype)), processor


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


def score_images(pairs, places, captions, model, processor, args):
    """Rewards of images for their captions.

    Args:
        pairs: `datasets.Dataset` with the image columns.
        places: (row, column) of each of K images.
        captions: caption of each image, K strings.
        model, processor: from `load_reward_model`.
        args: the command line.

    Returns:
        float32 `[K]`, cosines in [-1, 1]; NaN for an image that cannot be read.
    """
    index = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    unique_captions = list(index)
    text_embeddings = torch.cat(
        [
            embed_texts(model, processor, unique_captions[i : i + args.batch_size])
            for i in tqdm(range(0, len(index), args.batch_size), desc="Captions", unit="batch")
        ]
    )
    caption_of_image = torch.tensor([index[caption] for caption in captions])
    dataloader = torch.utils.data.DataLoader(
        RewardImages(pairs, places, processor.image_processor),
        batch_size=args.batch_size,
        collate_fn=collate_images,
        num_workers=args.dataloader_num_workers,
    )
    scores = np.full(len(places), np.nan, dtype=np.float32)
    with tqdm(total=len(places), desc="Images", unit="image") as bar:
        for i, pixel_values in dataloader:
            if i:
                texts = text_embeddings[caption_of_image[i].to(text_embeddings.device)]
                scores[i] = (embed_images(model, pixel_values) * texts).sum(-1).cpu().numpy()
            bar.update(min(args.batch_size, len(places) - bar.n))
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def score_pairs(pairs, args):
    """Scores every (image uid, caption) of P pairs once.

    Returns:
        Raw scores of image 0 and image 1, float32 `[2, P]`, NaN where there is none; the reward model's commit on the Hub,
        or None.

    Raises:
        ValueError: there is no caption at all, or see `load_reward_model`.
    """
    uids = pairs.select_columns([args.image_0_uid_column, args.image_1_uid_column]).with_format("arrow")[:]
    captions = pairs.select_columns([args.caption_column]).with_format("arrow")[:][args.caption_column].to_pylist()
    places, image_captions, image_of = [], [], {}
    scored = np.full((2, len(pairs)), -1)  # which of the images to score stands there, -1 where there is no caption
    columns = [(args.image_0_column, args.image_0_uid_column), (args.image_1_column, args.image_1_uid_column)]
    for side, (column, uid_column) in enumerate(columns):
        for row, uid in enumerate(uids[uid_column].to_pylist()):
            if captions[row] is None:
                continue
            key = (uid, captions[row])
            if key not in image_of:
                image_of[key] = len(places)
                places.append((row, column))
                image_captions.append(captions[row])
            scored[side, row] = image_of[key]
    if not places:
        raise ValueError(f"--caption_column {args.caption_column} of {args.dataset_name} holds no captions.")
    model, processor = load_reward_model(args)
    image_columns = pairs.select_columns([column for column, _ in columns])
    scores = score_images(image_columns, places, image_captions, model, processor, args)
    return np.append(scores, np.float32("nan"))[scored], getattr(model.config, "_commit_hash", None)


def write_labels(path, pairs, scores, model_commit, args):
    """Writes the labels file, under a temporary name first, and returns its metadata.

    Raises:
        ValueError: no image could be scored, or all scores are equal.
    """
    finite = scores[np.isfinite(scores)]
    if not len(finite) or (args.score_min is None and finite.min() == finite.max()):
        raise ValueError(
            f"{len(finite)} of the {scores.size} images of {args.dataset_name} were scored, with {len(set(finite))}"
            f" different scores: at least two are needed. Check --image_0_column and --image_1_column."
        )
    score_min = float(finite.min()) if args.score_min is None else args.score_min
    score_max = float(finite.max()) if args.score_max is None else args.score_max
    label = soft_label(scores[0], scores[1], score_min, score_max).numpy()
    valid = np.isfinite(label)

    columns = dict(zip(LABEL_KEYS, (args.image_0_uid_column, args.image_1_uid_column, args.ranking_id_column)))
    columns = {"label_0": args.human_label_column, **columns}
    columns = {name: column for name, column in columns.items() if column in pairs.column_names}
    source = pairs.select_columns(list(columns.values())).with_format("arrow")[:]
    table = {key: source[columns[key]] for key in [*LABEL_KEYS, "label_0"] if key in columns}
    for i in (0, 1):
        table[f"score_{i}"] = pa.array(scores[i], pa.float32(), mask=~np.isfinite(scores[i]))
    table["soft_label_0"] = pa.array(label.astype(np.float32), pa.float32(), mask=~valid)
    table["valid"] = pa.array(valid)
    metadata = {
        "reward_model": args.reward_model,
        "reward_model_revision": model_commit or args.reward_model_revision,
        "reward_processor": args.reward_processor,
        "dtype": args.dtype,
        "score_min": score_min,
        "score_max": score_max,
        "range_from": "the scores" if args.score_min is None else "the command line",
        "num_rows": len(pairs),
        "num_valid": int(valid.sum()),
        "num_invalid": int((~valid).sum()),
        "dataset_name": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "dataset_split_name": args.dataset_split_name,
        "transformers": transformers.__version__,
    }
    table = pa.table(table).replace_schema_metadata({"smpo_labels": json.dumps(metadata)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return metadata


def main(args):
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    path = Path(args.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = load_data(args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir)
    required = ("image_0_column", "image_1_column", "caption_column", "image_0_uid_column", "image_1_uid_column")
    require_columns(pairs.column_names, {name: getattr(args, name) for name in required})
    scores, model_commit = score_pairs(pairs, args)
    metadata = write_labels(path, pairs, scores, model_commit, args)
    logger.info(f"{path}: {json.dumps(metadata, indent=2)}")
    report(pq.read_table(path))


def report(labels):
    """Logs what is worth knowing of the labels before training on them."""
    label = labels["soft_label_0"].drop_null().to_numpy()
    strength = np.quantile(np.abs(2 * label - 1), [0.1, 0.5, 0.9])
    logger.info("|2 soft_label_0 - 1|, 10 %, median, 90 %: " + ", ".join(f"{value:.4f}" for value in strength))
    if "label_0" in labels.column_names:
        decided = labels.filter(pc.and_(labels["valid"], pc.not_equal(labels["label_0"], 0.5)))
        agree = pc.equal(pc.greater(decided["soft_label_0"], 0.5), pc.greater(decided["label_0"], 0.5))
        agreement = pc.mean(agree).as_py()
        if agreement is not None:
            logger.info(
                f"The reward model agrees with the human label on {agreement:.1%} of {len(decided)} decided pairs."
            )


if __name__ == "__main__":
    main(parse_args())
