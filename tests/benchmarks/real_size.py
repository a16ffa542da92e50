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
"""One optimiser step of train_smpo_sd15.py with the real SD1.5 configuration and random weights, and its peak memory.

    python tests/benchmarks/real_size.py [--work_dir FOLDER] [--modes full lora] [-- FLAGS OF THE TRAINING SCRIPT]

The pipeline (UNet of 859.5 M parameters, VAE and text encoder of SD1.5) is written to the work folder once, in fp16. The
step runs in a process of its own on the tiny pairs, by default at 64 pixels in bf16, so that it fits a small machine.
Prints parameters, seconds and the peak resident memory of the process, as Markdown.
"""

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel


ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "tiny"


def write_pipeline(folder):
    """A StableDiffusionPipeline in SD1.5's configuration, random weights, fp16; the tokenizer is the tiny one."""
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        sample_size=512, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    torch.set_default_dtype(torch.float32)
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder, safety_checker=None, feature_extractor=None,
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "sd15" / "tokenizer"), requires_safety_checker=False,
        scheduler=PNDMScheduler.from_pretrained(TINY / "sd15" / "scheduler"),
    ).save_pretrained(folder)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "smpo-real-size")
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("flags", nargs="*", help="Further flags of the training script, after --.")
    args = parser.parse_args()
    pipeline = args.work_dir / "pipeline"
    if not (pipeline / "model_index.json").is_file():
        write_pipeline(pipeline)
    print("| mode | trained parameters | seconds in all | peak resident memory |\n|---|---|---|---|")
    before = 0
    for mode in sorted(args.modes, key=["lora", "full"].index):  # the peak of all children so far: the smaller first
        output_dir = args.work_dir / mode
        shutil.rmtree(output_dir, ignore_errors=True)
        command = [
            sys.executable, ROOT / "train_smpo_sd15.py", "--pretrained_model_name_or_path", pipeline,
            "--dataset_name", TINY / "pairs", "--label_column", "label_0", "--gamma", "1", "--output_dir", output_dir,
            "--resolution", "64", "--max_train_steps", "1", "--num_inversion_steps", "3", "--mixed_precision", "bf16",
            "--report_to", "none", *(["--rank", "16"] if mode == "lora" else []), *args.flags,
        ]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        parameters = re.search(r"Trained parameters: ([\d,]+)", done.stderr).group(1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        note = "" if peak > before else " (not above the mode before)"
        before = peak
        print(f"| {mode} | {parameters} | {time.perf_counter() - start:.0f} | {peak:.1f} GiB{note} |", flush=True)


if __name__ == "__main__":
    main()
