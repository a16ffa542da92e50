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
"""The scripts of this folder, launched as users launch them, on tiny models and pairs that are made here.

Nothing is downloaded. It takes some minutes on a CPU:

    python -m pytest test_smpo_diffusion.py
"""

import io
import json
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from accelerate.utils import write_basic_config
from PIL import Image
from safetensors.torch import load_file

import diffusers


FOLDER = Path(__file__).resolve().parent
LORA_FILE = "pytorch_lora_weights.safetensors"
OF_A_LORA = {"README.md", "logs", LORA_FILE, "pytorch_lora_weights_kohya.safetensors", "training_args.json"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOWER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TOWER, "vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "projection_dim": 32}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
UNET = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "cross_attention_dim": 32, "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SDXL_UNET = {
    **UNET, "cross_attention_dim": 64, "attention_head_dim": (2, 4), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": (1, 2),
}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_tokenizer(folder):
    """A CLIP tokenizer that spells every word."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def make_models(folder):
    """Stable Diffusion 1.5 and XL and a CLIP that rewards, all of them tiny and with random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    text_config = transformers.CLIPTextConfig(**TEXT)
    parts = {"vae": vae, "tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(text_config)}
    diffusers.StableDiffusionPipeline(
        **parts, unet=diffusers.UNet2DConditionModel(**UNET), scheduler=diffusers.DDIMScheduler(**BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "sd15")  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        **parts, unet=diffusers.UNet2DConditionModel(**SDXL_UNET), scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
        tokenizer_2=tokenizer, text_encoder_2=transformers.CLIPTextModelWithProjection(text_config),
    ).save_pretrained(folder / "sdxl")  # fmt: skip
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), tokenizer).save_pretrained(folder / "clip")


def make_pairs(path):
    """Eight pairs by Pick-a-Pic's schema, as far as it is used."""
    rng = np.random.default_rng(0)

    def jpeg():
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(72, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        return file.getvalue()

    rows = [
        {
            "jpg_0": jpeg(), "jpg_1": jpeg(), "caption": f"a {color} circle", "label_0": float(i % 2), "ranking_id": i,
            "image_0_uid": f"{i}-0", "image_1_uid": f"{i}-1",
        }
        for i, color in enumerate(["red", "green", "blue", "white", "black", "pink", "grey", "brown"])
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)


class SmPODiffusion(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        write_basic_config(save_location=str(cls.folder / "default_config.yml"))
        cls.launch = ["accelerate", "launch", "--config_file", str(cls.folder / "default_config.yml")]
        make_models(cls.folder)
        make_pairs(cls.folder / "pairs.parquet")

    def run_script(self, script, arguments):
        """Launches a script of this folder; the test fails with its output."""
        done = subprocess.run(
            [*self.launch, str(FOLDER / script), *arguments.split()], capture_output=True, text=True, cwd=self.folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def train(self, model, output_dir, arguments):
        flags = f"""
            --pretrained_model_name_or_path {model} --dataset_name pairs.parquet --output_dir {output_dir}
            --resolution 64 --train_batch_size 1 --num_inversion_steps 3 --learning_rate 5e-4 --seed 0 {arguments}
        """
        self.run_script(f"train_smpo_{model}.py", flags)

    def names_in(self, output_dir):
        return {path.name for path in (self.folder / output_dir).iterdir()} - {".lock"}

    def check_lora(self, model, output_dir):
        """A pipeline of the base model draws with it."""
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder / model, safety_checker=None)
        pipeline.load_lora_weights(self.folder / output_dir, weight_name=LORA_FILE)
        self.assertIn("unet", pipeline.get_list_adapters())
        pipeline("a red circle", num_inference_steps=1, height=64, width=64)

    def test_labels_training_and_evaluation(self):
        self.run_script(
            "relabel_pickapic.py", "--dataset_name pairs.parquet --reward_model tiny=clip --output_path labels.parquet"
        )
        labels = pq.read_table(self.folder / "labels.parquet")
        self.assertEqual(labels["valid"].to_pylist(), [True] * 8)
        self.train("sd15", "full", "--labels_path labels.parquet --max_train_steps 2 --checkpointing_steps 2")
        parts = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
        self.assertEqual(self.names_in("full"), {"README.md", "checkpoint-2", "logs", "training_args.json", *parts})
        before, after = (
            load_file(self.folder / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("sd15", "full")
        )
        self.assertEqual(before.keys(), after.keys())
        self.assertFalse([name for name in before if torch.equal(before[name], after[name])])
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(self.folder / "full")
        pipeline("a red circle", num_inference_steps=1, height=64, width=64)

        self.run_script(
            "evaluate_smpo.py",
            """
            --pretrained_model_name_or_path sd15 --models smpo=full --prompts_path pairs.parquet
            --reward_model tiny=clip --resolution 64 --num_inference_steps 2 --max_prompts 4 --output_dir evaluation
            """,
        )
        results = json.loads((self.folder / "evaluation" / "results.json").read_text())["results"]
        self.assertEqual([row["model"] for row in results], ["base", "smpo"])
        self.assertEqual(len(list((self.folder / "evaluation" / "images").rglob("*.png"))), 8)

    def test_lora_resumed_removes_several_checkpoints(self):
        flags = "--label_column label_0 --gamma 1 --rank 4 --checkpointing_steps 2"
        self.train("sd15", "resumed", f"{flags} --max_train_steps 4")
        self.assertEqual(self.names_in("resumed"), OF_A_LORA | {"checkpoint-2", "checkpoint-4"})
        flags += " --max_train_steps 8 --checkpoints_total_limit 2"
        self.train("sd15", "resumed", f"{flags} --resume_from_checkpoint latest")
        self.assertEqual(self.names_in("resumed"), OF_A_LORA | {"checkpoint-6", "checkpoint-8"})
        self.check_lora("sd15", "resumed")

    def test_sdxl_lora(self):
        self.train("sdxl", "sdxl-lora", "--label_column label_0 --gamma 1 --rank 4 --max_train_steps 2")
        self.assertEqual(self.names_in("sdxl-lora"), OF_A_LORA | {"checkpoint-2"})
        self.check_lora("sdxl", "sdxl-lora")
