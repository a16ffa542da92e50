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
#     "diffusers>=0.35.0",
#     "transformers>=4.55.0",
#     "accelerate>=1.7.0",
#     "datasets>=3.6.0",
#     "peft>=0.17.0",
#     "pillow>=10.1",
# ]
# ///
"""Says whether a tuned model wins: medians and win rates of base against tuned, under a reward model.

    python evaluate_smpo.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --models smpo=smpo-sd15 --prompts_path prompts.txt --output_dir evaluation

Every model draws every prompt with the same seeds, and every image gets its reward, 100 times the cosine of PickScore
(or of another CLIP-style model). A model's win rate over the base is the share of images with the higher reward than the
base's at the same prompt and seed, a tie counting a half; its 95 % interval is a bootstrap over prompts. The output folder
gets the images, `scores.csv` (one line an image), `results.json`, `results.md` and, for each model, `comparison-NAME.png`:
base beside tuned for prompts from the largest gain to the largest loss.
"""

import argparse
import csv
import json
import logging
import re
import textwrap
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import load_dataset, load_from_disk
from PIL import Image, ImageDraw
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from diffusers import DiffusionPipeline, UNet2DConditionModel


logger = logging.getLogger(__name__)

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore was tuned from this CLIP
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
NUM_BOOTSTRAP_SAMPLES = 10_000
NUM_COMPARED_PROMPTS = 12


# ---------------------------------------------------------------------------------------------------------------------
# The statistics
# ---------------------------------------------------------------------------------------------------------------------


def wins(scores, base_scores):
    """1 where a score is higher than the base's, 0 where it is lower, 0.5 at a tie; arrays of any one shape."""
    return (scores > base_scores) + 0.5 * (scores == base_scores)


def bootstrap_interval(values, seed):
    """95 % interval of the mean of `values` `[prompts, images]` when the prompts are drawn anew: (low, high).

    A percentile bootstrap with `NUM_BOOTSTRAP_SAMPLES` draws; the images of a prompt stay together, as they are not
    independent.
    """
    prompt_means = np.asarray(values, dtype=np.float64).mean(axis=1)
    draws = np.random.default_rng(seed).integers(len(prompt_means), size=(NUM_BOOTSTRAP_SAMPLES, len(prompt_means)))
    low, high = np.quantile(prompt_means[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def summarise(scores, seed):
    """One row a model: median and mean score, win rate over the base (the first model) and its 95 % interval.

    Args:
        scores: `{model: float array [prompts, images]}`, the base first.
        seed: of the bootstrap.
    """
    base = next(iter(scores.values()))
    rows = []
    for name, values in scores.items():
        row = {"model": name, "median": float(np.median(values)), "mean": float(np.mean(values))}
        if values is not base:
            won = wins(values, base)
            low, high = bootstrap_interval(won, seed)
            row.update(win_rate=float(won.mean()), win_rate_low=low, win_rate_high=high)
        rows.append(row)
    return rows


def as_markdown(rows):
    """The rows of `summarise` as a Markdown table."""
    lines = ["| model | median score | mean score | win rate over base | 95 % interval |", "|---|---|---|---|---|"]
    for row in rows:
        win_rate, interval = "", ""
        if "win_rate" in row:
            win_rate = f"{row['win_rate']:.1%}"
            interval = f"{row['win_rate_low']:.1%} to {row['win_rate_high']:.1%}"
        lines.append(f"| {row['model']} | {row['median']:.3f} | {row['mean']:.3f} | {win_rate} | {interval} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Medians and win rates, base against tuned.")

    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Base model: a Hub name or a folder.")
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help='Variant of the base model\'s weight files, for example "fp16".')
    group.add_argument(
        "--models",
        nargs="+",
        required=True,
        help="Tuned models, each PATH or NAME=PATH: a pipeline (folder or Hub name), a UNet folder, a training checkpoint,"
        " or a LoRA file or folder, the last three on top of the base model.",
    )
    group.add_argument("--cache_dir", help="Where downloaded models and data are kept.")

    group = parser.add_argument_group("prompts", "Give one of --prompts_path and --dataset_name.")
    group.add_argument(
        "--prompts_path",
        help="Text file with a prompt a line. With --dataset_name, the different captions are the prompts.",
    )
    group.add_argument(
        "--dataset_name",
        help="Data set: a Hub name, a folder, a Parquet file or glob, or a `save_to_disk` folder.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", "--split", default="train", help="Split of the data set.")
    group.add_argument("--caption_column", default="caption", help="Prompt of the images.")
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
        "--reward_model", default=PICKSCORE, help="CLIP-style model that scores: a Hub name or a folder."
    )
    group.add_argument("--reward_model_revision", help="Revision of the reward model on the Hub.")
    group.add_argument(
        "--reward_processor",
        help=f"Processor of the reward model. Default: the model's own; for PickScore {PICKSCORE_PROCESSOR}.",
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where models run.")
    group.add_argument(
        "--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="Precision of the models."
    )
    group.add_argument("--batch_size", type=int, default=16, help="Images at a time.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="Folder for images, scores and tables.")

    args = parser.parse_args(input_args)
    validate_args(args)
    return args


def validate_args(args):
    """Checks the flags and turns --models into `{name: path}`.

    Raises:
        ValueError: with every problem that the flags alone show, one a line, before anything is loaded.
    """
    problems = []
    for name in ("max_prompts", "num_images_per_prompt", "num_inference_steps", "resolution", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            problems.append(f"--{name} must be positive, got {getattr(args, name)}.")
    if args.resolution % 8:
        problems.append(f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}.")
    if (args.prompts_path is None) == (args.dataset_name is None):
        problems.append("Give prompts with one of --prompts_path and --dataset_name.")
    if args.prompts_path is not None and not Path(args.prompts_path).is_file():
        problems.append(f"--prompts_path {args.prompts_path} is not a file.")
    models = {}
    for model in args.models:
        name, _, path = model.rpartition("=")
        name = name or Path(path).stem
        if not re.fullmatch(r"[\w.-]+", name) or name == "base" or name in models:
            problems.append(
                f"--models {model}: {name!r} cannot name it, as it is taken or has other characters than letters, digits,"
                " '.', '_' and '-'. Give NAME=PATH."
            )
        models[name] = path
        if model_kind(path) is None:
            problems.append(
                f"--models {model}: {path} is neither a Hub name nor a pipeline, a UNet folder, a training checkpoint or a"
                " LoRA file."
            )
    if problems:
        raise ValueError("\n".join(problems))
    args.models = models
    if args.reward_processor is None:
        args.reward_processor = PICKSCORE_PROCESSOR if args.reward_model == PICKSCORE else args.reward_model


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


def load_prompts(args):
    """The different prompts, in the order in which they first occur.

    Raises:
        ValueError: there is none, or the data set cannot be read.
    """
    if args.prompts_path is not None:
        prompts = [line.strip() for line in Path(args.prompts_path).read_text(encoding="utf-8").splitlines()]
    else:
        data = load_data(args.dataset_name, args.dataset_config_name, args.dataset_split_name, args.cache_dir)
        require_columns(data.column_names, {"caption_column": args.caption_column})
        prompts = data.select_columns([args.caption_column])[:][args.caption_column]
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt))[: args.max_prompts]
    if not prompts:
        raise ValueError(f"{args.prompts_path or args.dataset_name} has no prompts.")
    return prompts


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


def load_pipeline(path, args):
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
    return pipeline.to(args.device)


def draw_images(name, pipeline, prompts, args):
    """Draws every prompt with every seed and saves the images as `images/NAME/PROMPT_IMAGE.png`; their paths, in order."""
    folder = Path(args.output_dir) / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(prompt, i) for prompt in range(len(prompts)) for i in range(args.num_images_per_prompt)]
    paths = []
    with tqdm(total=len(jobs), desc=f"Images of {name}", unit="image") as bar:
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            images = pipeline(
                [prompts[prompt] for prompt, _ in batch],
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                # On the CPU, so that an image does not depend on the device or on the batch it is drawn in.
                generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))],
            ).images
            for (prompt, i), image in zip(batch, images):
                paths.append(folder / f"{prompt:05d}_{i}.png")
                image.save(paths[-1])
            bar.update(len(batch))
    return paths


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


def compare(base_paths, tuned_paths, gaps, prompts):
    """`side_by_side` of at most `NUM_COMPARED_PROMPTS` prompts, evenly spaced from the largest gain to the largest loss.

    `base_paths` and `tuned_paths` are `[prompts][images]`, `gaps` is tuned less base, averaged over images, `[prompts]`.
    """
    order = np.argsort(-gaps, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(NUM_COMPARED_PROMPTS, len(order))).round().astype(int)]
    images = [
        [[Image.open(path) for path in paths[prompt]] for prompt in chosen] for paths in (base_paths, tuned_paths)
    ]
    return side_by_side(*images, [f"{prompts[prompt]} ({gaps[prompt]:+.2f})" for prompt in chosen])


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


def score_paths(paths, prompts, model, processor, args):
    """100 times the cosine of each image file and its prompt: float array `[len(paths)]`."""
    scores = []
    for start in tqdm(range(0, len(paths), args.batch_size), desc="Scores", unit="batch"):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + args.batch_size]]
        image_embeddings = embed_images(
            model, processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        )
        text_embeddings = embed_texts(model, processor, prompts[start : start + args.batch_size])
        scores.append(100 * (image_embeddings * text_embeddings).sum(-1).cpu().numpy())
    return np.concatenate(scores).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    prompts = load_prompts(args)
    model, processor = load_reward_model(args)
    output_dir = Path(args.output_dir)
    shape = (len(prompts), args.num_images_per_prompt)
    prompt_of_image = [prompt for prompt in prompts for _ in range(args.num_images_per_prompt)]

    paths, scores = {}, {}
    for name, path in {"base": None, **args.models}.items():
        pipeline = load_pipeline(path, args)
        drawn = draw_images(name, pipeline, prompts, args)
        del pipeline
        scores[name] = score_paths(drawn, prompt_of_image, model, processor, args).reshape(shape)
        paths[name] = np.array(drawn).reshape(shape)

    with open(output_dir / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "prompt", "seed", "score", "image"])
        for name in scores:
            for (prompt, i), score in np.ndenumerate(scores[name]):
                image = paths[name][prompt, i].relative_to(output_dir)
                seed = args.seed + prompt * args.num_images_per_prompt + i
                writer.writerow([name, prompts[prompt], seed, score, image])
    rows = summarise(scores, args.seed)
    record = {"results": rows, "num_prompts": len(prompts), "args": vars(args)}
    (output_dir / "results.json").write_text(json.dumps(record, indent=2))
    (output_dir / "results.md").write_text(as_markdown(rows) + "\n")
    for name in args.models:
        gaps = (scores[name] - scores["base"]).mean(axis=1)
        compare(paths["base"], paths[name], gaps, prompts).save(output_dir / f"comparison-{name}.png")
    print(as_markdown(rows))
    print(f"Images, scores and comparisons are in {output_dir}.")


if __name__ == "__main__":
    main(parse_args())
