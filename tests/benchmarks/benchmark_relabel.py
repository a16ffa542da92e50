# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of relabel_pickapic.py on pairs and with reward models that are made up on the spot.

    python tests/benchmarks/benchmark_relabel.py speed --model clip-h --size 768 --num_pairs 4096   # on a GPU
    python tests/benchmarks/benchmark_relabel.py speed --model small --size 512 --num_pairs 256     # on a CPU
    python tests/benchmarks/benchmark_relabel.py memory

`speed` scores the same pairs with the same model twice: with the script, and with a loop that takes one image at a
time in fp32, as `preprocessing.py` of the authors does. No image stands in two pairs (in Pick-a-Pic many do, and only
the script makes use of it); 16 pairs share a caption. It also says by how much their scores differ. `memory` compares
the peak of the resident memory for 10 and for 100 files. Further flags are passed on to the script. Weights are
random: the numbers of operations are those of real ones.
"""

import argparse
import io
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor


ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
TINY = ROOT / "tests" / "tiny"
PICKAPIC_ROWS = 959_040
NUM_IMAGES = 32  # different ones; their uids say that they are all different
ROWS_PER_FILE = 512
ROWS_PER_CAPTION = 16
LOOP_PAIRS = 64  # the slow loop need not take all
MODELS = {  # width, layers and heads of the vision tower, of the text tower; size of the projection, side of a patch
    "clip-h": ((1280, 32, 16), (1024, 24, 16), 1024, 14),  # PickScore and HPSv2.1 are this: OpenCLIP's ViT-H/14
    "small": ((256, 6, 4), (256, 6, 4), 256, 32),
}


def write_model(folder, kind):
    """A CLIP with random weights, the tiny reward model's tokenizer, and CLIP's preprocessing for 224 pixels."""
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    processor.image_processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    processor.save_pretrained(folder)
    *towers, projection_dim, patch_size = MODELS[kind]
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    vision, text = (dict(zip(names, (*tower, 4 * tower[0]))) for tower in towers)
    vision |= {"image_size": 224, "patch_size": patch_size}
    text = {**CLIPConfig.from_pretrained(TINY / "pickscore").text_config.to_dict(), **text}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)
    CLIPModel(config).save_pretrained(folder)


def make_photo(size, rng):
    """A JPEG with the spectrum of a photograph, amplitudes falling as one over the frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((3, size, size))) / frequency
    pixels = np.fft.ifft2(noise).real
    low, high = pixels.min(axis=(1, 2), keepdims=True), pixels.max(axis=(1, 2), keepdims=True)
    pixels = ((pixels - low) / (high - low) * 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(data, "JPEG", quality=90)
    return data.getvalue()


def write_pairs(folder, num_files, rows_per_file, size):
    """Parquet files of pairs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photos = [make_photo(size, rng) for _ in range(NUM_IMAGES)]
    for number in range(num_files):
        rows = range(number * rows_per_file, (number + 1) * rows_per_file)
        columns = {
            "jpg_0": [photos[row % NUM_IMAGES] for row in rows],
            "jpg_1": [photos[(7 * row + 3) % NUM_IMAGES] for row in rows],
            "caption": [f"a large red circle {row // ROWS_PER_CAPTION}" for row in rows],
            "image_0_uid": [f"left {row}" for row in rows],
            "image_1_uid": [f"right {row}" for row in rows],
        }
        pq.write_table(pa.table(columns), folder / f"train-{number:05d}.parquet", row_group_size=100)


def score_one_at_a_time(table, model, processor, device):
    """Scores of pairs as they are had without thinking: `[P, 2]`."""
    scores = []
    for row in table.to_pylist():
        text = processor(text=[row["caption"]], truncation=True, max_length=77, return_tensors="pt").to(device)
        for column in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[column])).convert("RGB")
            pixels = processor(images=[image], return_tensors="pt").to(device)
            with torch.no_grad():
                out = model(**text, **pixels)
            scores.append((out.logits_per_image[0, 0] / model.logit_scale.exp()).item())
    return np.array(scores).reshape(-1, 2)


def speed(args, folder):
    import relabel_pickapic

    photo = make_photo(args.size, np.random.default_rng(0))
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    started = time.perf_counter()
    for _ in range(32):
        processor(images=relabel_pickapic.decode_image(photo), return_tensors="pt")
    per_image = (time.perf_counter() - started) / 32

    write_model(folder / "model", args.model)
    num_files = -(-args.num_pairs // ROWS_PER_FILE)
    write_pairs(folder / "pairs", num_files, min(args.num_pairs, ROWS_PER_FILE), args.size)
    flags = ["--dataset_name", str(folder / "pairs"), "--reward_model", str(folder / "model")]
    flags += ["--output_path", str(folder / "labels.parquet"), *args.flags]
    with unittest.TestCase().assertLogs("relabel_pickapic", "INFO") as logs:
        relabel_pickapic.main(relabel_pickapic.parse_args(flags))
    images, seconds = re.search(r"(\d+) images scored in ([\d.]+) s", "\n".join(logs.output)).groups()
    rows = int(images) // 2
    ours = rows / float(seconds)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CLIPModel.from_pretrained(folder / "model").eval().to(device)
    processor = CLIPProcessor.from_pretrained(folder / "model")
    table = pq.read_table(folder / "pairs" / "train-00000.parquet").slice(0, LOOP_PAIRS)
    score_one_at_a_time(table.slice(0, 2), model, processor, device)
    started = time.perf_counter()
    theirs = score_one_at_a_time(table, model, processor, device)
    loop = len(table) / (time.perf_counter() - started)
    labels = pq.read_table(folder / "labels.parquet")
    ours_scores = np.stack([labels[f"score_{i}"].to_numpy()[: len(table)] for i in (0, 1)], axis=1)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    pairs = f"{rows} pairs of {args.size} px, {len(photo) // 1024} KB an image"
    print(f"\n{name}; torch {torch.__version__}; {args.model}; {pairs}\n")
    print(f"Decoding and preprocessing takes a core {1000 * per_image:.1f} ms an image.\n")
    print("| | rows/s | ratio | 959,040 rows |")
    print("|---|---|---|---|")
    print(f"| one image at a time, fp32 | {loop:.2f} | 1 | {PICKAPIC_ROWS / loop / 3600:.1f} h |")
    print(f"| relabel_pickapic.py | {ours:.2f} | {ours / loop:.1f} | {PICKAPIC_ROWS / ours / 3600:.1f} h |")
    difference = np.abs(ours_scores - theirs).max()
    print(f"\nLargest difference of a score: {difference:.1e}, of scores that span {np.ptp(theirs):.1e}.")
    return difference


def memory(args, folder):
    """Peak resident memory of a run on its own, in MiB, by the number of files."""
    write_model(folder / "model", "small")
    print("| files | rows | peak memory, MiB |\n|---|---|---|")
    for num_files in (10, 100):
        pairs = folder / f"pairs-{num_files}"
        write_pairs(pairs, num_files, args.rows_per_file, args.size)
        flags = ["--dataset_name", pairs, "--reward_model", folder / "model"]
        flags += ["--output_path", folder / f"{num_files}.parquet"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        command = [sys.executable, ROOT / "relabel_pickapic.py", *flags, *args.flags]
        subprocess.run(command, check=True, capture_output=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        same = " (no more than the row above)" if peak == before else ""
        print(f"| {num_files} | {num_files * args.rows_per_file} | {peak / 1024:.0f}{same} |", flush=True)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--model", choices=MODELS, default="small", help="For `speed`.")
    parser.add_argument("--size", type=int, default=512, help="Side of the images, in pixels.")
    parser.add_argument("--num_pairs", type=int, default=256, help="For `speed`.")
    parser.add_argument("--rows_per_file", type=int, default=48, help="For `memory`.")
    parser.add_argument("--work_dir", help="Where to put models and pairs for a while.")
    args, args.flags = parser.parse_known_args(input_args)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        return {"speed": speed, "memory": memory}[args.what](args, Path(folder))


if __name__ == "__main__":
    main()
