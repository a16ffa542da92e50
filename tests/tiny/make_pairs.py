# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Makes the tiny preference pairs, in the schema of Pick-a-Pic v2, that the tests and the demo run on.

    python tests/tiny/make_pairs.py --output_dir tests/tiny --work_dir /tmp/tiny

after `make_models.py` with the same folders. The images come from four sources, none of which is the base model:
renders that follow the caption, careless renders that get attributes wrong and look dull, and an early checkpoint of
the UNet with and without guidance. The human label is drawn by the judge. Some rows are damaged, as in the real data.
Writes `pairs/train.parquet` and `pairs/test.parquet`, whose prompts differ.
"""

import argparse
import datetime
import io
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from judge import Judge
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm
from world import caption, corrupt, random_scenes, random_vividness, render

from diffusers import DDIMScheduler, StableDiffusionPipeline


SEED = 10
SPLITS = {"train": 200, "test": 64}  # prompts
IMAGES_PER_PROMPT = 3
SOURCES = ["render-faithful", "render-careless", "tiny-early", "tiny-early-guided"]
DAMAGED = [b"", b"no image at all", "truncated", "truncated", None]  # jpg_0 of the extra rows at the end of train
TIE_MARGIN = 0.7  # a judge's gap below it is a tie
SCHEMA = pa.schema({
    "are_different": pa.bool_(), "best_image_uid": pa.string(), "caption": pa.string(),
    "created_at": pa.timestamp("ns"), "has_label": pa.bool_(), "image_0_uid": pa.string(),
    "image_0_url": pa.string(), "image_1_uid": pa.string(), "image_1_url": pa.string(), "jpg_0": pa.binary(),
    "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64(), "model_0": pa.string(),
    "model_1": pa.string(), "ranking_id": pa.int64(), "user_id": pa.int64(), "num_example_per_prompt": pa.int64(),
    "__index_level_0__": pa.int64(),
})  # fmt: skip


def draw(source, scenes, pipeline, generator):
    """Pictures `[n, 3, 64, 64]` in [0, 1] of one source."""
    if source == "render-faithful":
        return render(scenes, 0.3 + 0.7 * random_vividness(len(scenes), generator), generator)
    if source == "render-careless":
        return render(corrupt(scenes, 0.4, generator), 0.7 * random_vividness(len(scenes), generator), generator)
    pictures = []
    for start in tqdm(range(0, len(scenes), 64), desc=source):
        prompts = [caption(scene) for scene in scenes[start : start + 64]]
        guidance_scale = 3.0 if source == "tiny-early-guided" else 1.0
        out = pipeline(prompts, num_inference_steps=20, guidance_scale=guidance_scale, generator=generator,
                       output_type="pt", height=64, width=64)  # fmt: skip
        pictures.append(out.images)
    return torch.cat(pictures).float()


def as_jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def make_split(split, scenes, pipeline, judge, generator, rng):
    pictures = torch.stack([draw(source, scenes, pipeline, generator) for source in SOURCES], dim=1)
    jpegs = {}
    rows = []
    for prompt, scene in enumerate(scenes):
        damaged = prompt - (len(scenes) - len(DAMAGED)) if split == "train" else -1
        sources = rng.choice(len(SOURCES), IMAGES_PER_PROMPT, replace=False)
        scores = judge.score(pictures[prompt, sources], scene.expand(len(sources), -1))
        couples = [(i, j) for i in range(len(sources)) for j in range(i)]
        couples = couples[:1] if split == "test" or damaged >= 0 else couples
        for couple in couples:
            couple = rng.permutation(couple)
            keys = [(prompt, sources[i]) for i in couple]
            uids = [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{split} {prompt} {source}")) for _, source in keys]
            for key in keys:
                jpegs.setdefault(key, as_jpeg(pictures[key]))
            data = [jpegs[key] for key in keys]
            if damaged >= 0:
                data[0] = data[0][: len(data[0]) // 2] if DAMAGED[damaged] == "truncated" else DAMAGED[damaged]
            gap = float(scores[couple[0]] - scores[couple[1]])
            label_0 = 0.5 if abs(gap) < TIE_MARGIN else float(rng.random() < 1 / (1 + np.exp(-gap)))
            rows.append(
                {
                    "are_different": True,
                    "best_image_uid": "tie" if label_0 == 0.5 else uids[0] if label_0 == 1 else uids[1],
                    "caption": caption(scene),
                    "created_at": datetime.datetime(2023, 1, 1) + datetime.timedelta(minutes=len(rows)),
                    "has_label": True,
                    "num_example_per_prompt": len(couples),
                    "label_0": label_0,
                    "label_1": 1 - label_0,
                    "user_id": int(rng.integers(50)),
                }
            )
            for i in (0, 1):
                rows[-1][f"image_{i}_uid"], rows[-1][f"jpg_{i}"] = uids[i], data[i]
                rows[-1][f"model_{i}"] = SOURCES[keys[i][1]]
                rows[-1][f"image_{i}_url"] = f"https://example.invalid/{uids[i]}.jpg"
    rows = [rows[i] for i in rng.permutation(len(rows))]
    for i, row in enumerate(rows):
        row["ranking_id"], row["__index_level_0__"] = 1000 + i, i
    return pa.Table.from_pylist(rows, SCHEMA)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--work_dir", type=Path, required=True)
    args = parser.parse_args()
    generator, rng = torch.Generator().manual_seed(SEED), np.random.default_rng(SEED)
    pipeline = StableDiffusionPipeline.from_pretrained(args.work_dir / "early", torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    judge = Judge()
    judge.load_state_dict(load_file(args.output_dir / "judge.safetensors"))
    scenes = torch.unique(random_scenes(2 * sum(SPLITS.values()), generator), dim=0)
    scenes = scenes[torch.randperm(len(scenes), generator=generator)]
    folder = args.output_dir / "pairs"
    folder.mkdir(exist_ok=True)
    for split, prompts in SPLITS.items():
        table = make_split(split, scenes[:prompts], pipeline, judge, generator, rng)
        scenes = scenes[prompts:]
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", row_group_size=256)
        ties = np.mean(np.array(table["label_0"]) == 0.5)
        print(f"{split}: {len(table)} pairs, {ties:.1%} ties, {(folder / f'{split}.parquet').stat().st_size} bytes")


if __name__ == "__main__":
    main()
