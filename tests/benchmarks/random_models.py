# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 1.5 and XL in their published configurations with random weights, and both in miniature; and what
the benchmarks give to the training scripts: arguments, models and a batch.

The miniature of SDXL has its blocks, so its parameters have the same names; widths are small, and transformer layers
few. "tiny-sd15" is the trained model of tests/tiny, "small-sd15" SD1.5 at a quarter of its width between that model's
VAE and text encoder.
"""

import argparse
import importlib
import itertools
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest import mock

import pyarrow.parquet as pq
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel


TINY = Path(__file__).parent.parent / "tiny"
sys.path.insert(0, str(TINY.parent.parent))  # the scripts
PIXELS = {"sd15": 512, "sdxl": 1024}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},  # the rest are the defaults of the class
    "small-sd15": {"sample_size": 16, "cross_attention_dim": 64, "block_out_channels": (80, 160, 320, 320),
                   "norm_num_groups": 16},
    "sdxl": {
        **SDXL_BLOCKS, "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "tiny-sdxl": {
        **SDXL_BLOCKS, "sample_size": 8, "block_out_channels": (16, 32, 48), "attention_head_dim": (1, 2, 3),
        "cross_attention_dim": 48, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72,
        "norm_num_groups": 8, "transformer_layers_per_block": (1, 1, 2),
    },
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_ENCODERS = {
    "sd15": [CLIP_L],
    "sdxl": [
        CLIP_L,
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
         "hidden_act": "gelu", "projection_dim": 1280},
    ],
    "tiny-sdxl": [
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
         "hidden_act": "gelu", "projection_dim": 24},
    ],
}  # fmt: skip
TINY_TOKENS = {"vocab_size": 597, "bos_token_id": 595, "eos_token_id": 596, "pad_token_id": 596}


def make_unet(kind):
    """The UNet of `kind`; the norms of SDXL's miniature are not 1 and 0, so that rounding shows."""
    if kind == "tiny-sd15":
        return UNet2DConditionModel.from_pretrained(TINY / "sd15" / "unet").float()
    unet = UNet2DConditionModel(**UNETS[kind])
    if kind == "tiny-sdxl":
        for module in unet.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                torch.nn.init.normal_(module.weight, mean=1.0, std=0.1)
                torch.nn.init.normal_(module.bias, std=0.1)
    return unet


def make_vae(kind):
    """The VAE of `kind`; the miniatures' is the trained one of the tiny SD1.5."""
    if kind not in ("sd15", "sdxl"):
        return AutoencoderKL.from_pretrained(TINY / "sd15" / "vae").float()
    return AutoencoderKL(
        sample_size={"sd15": 512, "sdxl": 1024}[kind], latent_channels=4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor={"sd15": 0.18215, "sdxl": 0.13025}[kind], force_upcast=False,  # sdxl-vae-fp16-fix
    )  # fmt: skip


def make_text_encoders(kind):
    """The text encoders of `kind`, one or two; SD1.5's and SDXL's know the tiny tokenizer's words all the same."""
    if kind in ("tiny-sd15", "small-sd15"):
        with torch.device("cpu"):  # transformers loads nothing onto the meta device
            return [CLIPTextModel.from_pretrained(TINY / "sd15" / "text_encoder").float()]
    tokens = TINY_TOKENS if kind == "tiny-sdxl" else {}
    configs = [CLIPTextConfig(**{"projection_dim": 768, **config, **tokens}) for config in TEXT_ENCODERS[kind]]
    classes = [CLIPTextModel, CLIPTextModelWithProjection]
    return [text_encoder_class(config) for text_encoder_class, config in zip(classes, configs)]


def parse(kind, resolution, *flags):
    """The training script of `kind`, and what it makes of flags."""
    script = importlib.import_module("train_smpo_sdxl" if "sdxl" in kind else "train_smpo_sd15")
    command = "--pretrained_model_name_or_path none --dataset_name none --output_dir none --noising renoise".split()
    return script, script.parse_args([*command, "--resolution", str(resolution), *map(str, flags)])


def make_models(kind, script, args, device, dtype):
    """What the script's own functions make of the networks for training in `dtype`, with a tokenizer and no files."""
    makers, tokenizer = {"unet": make_unet, "vae": make_vae}, CLIPTokenizer.from_pretrained(TINY / "sd15/tokenizer")

    def load_network(part, network_class, args, dtype=None):
        torch.manual_seed(0)  # the reference is the policy's start
        network = makers[part](kind)
        return network.config if dtype is None else torch.nn.Module.to(network, dtype)

    def make_pipeline(unet, args, vae, **options):
        parts = {**dict.fromkeys(script.TOKENIZERS, tokenizer), "unet": unet, "vae": vae}
        return SimpleNamespace(components=parts | dict(zip(script.TEXT_ENCODERS, make_text_encoders(kind))))

    args = argparse.Namespace(**{**vars(args), "offload": False})  # networks without data cannot be moved
    with (
        torch.device(device),
        mock.patch.object(script, "load_network", load_network),
        mock.patch.object(script, "make_pipeline", make_pipeline),
    ):
        models = script.load_models(args, device, dtype)
        script.set_up_unets(SimpleNamespace(device=device, distributed_type="NO"), models, dtype, args)
    return models


@contextmanager
def casts_of_autocast(models):
    """Norms read and write fp32 wherever autocast has them do so, and LoRA layers read it, as without the script's own
    `norm_without_autocast`."""
    networks = filter(None, (models["unet"], models["ref_unet"]))
    with ExitStack() as stack:
        for module in itertools.chain.from_iterable(network.modules() for network in networks):
            if "forward" in vars(module) and isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                stack.enter_context(mock.patch.object(module, "forward", MethodType(type(module).forward, module)))
            elif hasattr(module, "lora_A"):
                stack.enter_context(mock.patch.object(module, "cast_input_dtype_enabled", True))
        yield


def make_batch(script, args, timesteps):
    """A batch of the first tiny pair at each of the timesteps."""
    row = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 1).to_pylist()[0]
    drawn = [{"mirror": False, "empty": False, "timestep": t, "seeds": [1, 2, 3]} for t in timesteps]
    return script.collate_pairs([{**script.prepare_pair(row, 0.9, one, args), "problems": []} for one in drawn])


def write_sdxl(folder):
    """Writes the miniature of SDXL with random weights and the tokenizer of the tiny SD1.5."""
    unet, vae, encoders = make_unet("tiny-sdxl"), make_vae("tiny-sdxl"), make_text_encoders("tiny-sdxl")
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "sd15" / "tokenizer")
    StableDiffusionXLPipeline(
        unet=unet, vae=vae, text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1],
        tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(**BETAS),
    ).save_pretrained(folder)  # fmt: skip
