# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Trains the tiny models that the tests and the demo run on, from nothing, on two CPU cores in about half an hour.

    python tests/tiny/make_models.py --output_dir tests/tiny --work_dir /tmp/tiny

writes the SD1.5-shaped pipeline (`sd15/`), the PickScore-shaped reward model (`pickscore/`) and the judge
(`judge.safetensors`), and leaves in `--work_dir` what only `make_pairs.py` needs: an early checkpoint of the UNet.
`--only NAME` trains one of `vae unet widen pickscore judge` again; each needs what stands before it in that list, but
for the last two, which need only the tokenizer.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from judge import Judge
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from world import RESOLUTION, caption, corrupt, random_scenes, random_vividness, render, render_with_mask

from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel


SEEDS = {"vae": 0, "unet": 1, "pickscore": 2, "judge": 3, "widen": 4}
WRONG_CAPTIONS = 0.12  # share of the attributes of the base model's captions that do not fit the picture
BANK = 32_768  # latents that the UNet trains on
NOISE_FLOOR = 0.15  # standard deviation of the final VAE's posterior, in scaled latents
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of SD1.5


def optimise(parameters, steps, learning_rate, loss_of_step, name, after_step=lambda step: None):
    """AdamW with a linear warm-up over 100 steps and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    bar = tqdm(range(steps), desc=name, mininterval=10)
    for step in bar:
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after_step(step)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def make_tokenizer(folder, generator):
    """A CLIP tokenizer (lower case, byte-level BPE, 77 tokens) whose few merges were learned on the captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([caption(s) for s in random_scenes(4096, generator)], trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    pieces = list(dict.fromkeys(pieces)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    return CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer, **kwargs):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **kwargs,
    )  # fmt: skip


def tokenize(tokenizer, scenes):
    captions = [caption(s) for s in scenes]
    return tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def make_vae(folder, generator, steps=2800, batch=16):
    vae = AutoencoderKL(
        sample_size=RESOLUTION, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        block_out_channels=(16, 16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip

    vae.to(memory_format=torch.channels_last)
    with torch.no_grad():  # the posterior starts narrow: with its usual width of 1 learning is many times slower
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6

    def loss_of_step(step):
        scenes, vividness = random_scenes(batch, generator), random_vividness(batch, generator)
        pictures, inside = render_with_mask(scenes, vividness, generator)
        posterior = vae.encode(2 * pictures - 1).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - (2 * pictures - 1)
        # The shape counts eightfold: a twentieth of the picture, it is otherwise the last thing to be learned.
        return ((1 + 8 * inside) * (error.abs() + error**2)).mean() + 1e-6 * posterior.kl().mean() / 256

    optimise(list(vae.parameters()), steps, 2e-3, loss_of_step, "vae")
    latents = encode_bank(vae, 512, generator)[0]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().to(memory_format=torch.contiguous_format).save_pretrained(folder)


@torch.no_grad()
def encode_bank(vae, n, generator):
    """Unscaled latents `[n, 4, 8, 8]` of random pictures, and their scenes `[n, 5]`."""
    latents, scenes = [], []
    for _ in tqdm(range(0, n, 64), desc="latents", mininterval=10):
        scenes.append(random_scenes(64, generator))
        pictures = render(scenes[-1], random_vividness(64, generator), generator)
        latents.append(vae.encode(2 * pictures - 1).latent_dist.sample(generator))
    return torch.cat(latents), torch.cat(scenes)


def make_pipeline(folder, early_folder, generator, steps=4000, batch=64, early_step=1200):
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    tokenizer = make_tokenizer(folder / "tokenizer", generator)
    text_encoder = CLIPTextModel(text_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8, block_out_channels=(64, 112), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=8, norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    latents, scenes = encode_bank(vae, BANK, generator)
    latents = latents * vae.config.scaling_factor
    loss_of_step = make_unet_loss(unet, text_encoder, tokenizer, latents, scenes, batch, generator)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))

    def save(to):
        unet.load_state_dict(ema.module["unet"].state_dict())
        text_encoder.load_state_dict(ema.module["text_encoder"].state_dict())
        StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, safety_checker=None,
            scheduler=PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1),
            feature_extractor=None, requires_safety_checker=False,
        ).to(dtype=torch.float16).save_pretrained(to)  # fmt: skip

    def after_step(step):
        ema.update_parameters(model)
        if step + 1 == early_step:
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            save(early_folder)
            for part in (vae, unet, text_encoder):
                part.float()
            model.load_state_dict(weights)

    optimise(list(model.parameters()), steps, 1e-3, loss_of_step, "unet", after_step)
    save(folder)


def widen_posterior(folder, generator, decoder_steps=700, unet_steps=1200, batch=64):
    """Gives the latents a noise floor, and tunes the decoder and then the UNet to it.

    The VAE keeps little of the fine texture. Without something unpredictable in the latents the noise that inversion
    finds would be too small (its standard deviation 0.6 instead of 1), so the posterior gets a fixed width.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    vae, unet, text_encoder, tokenizer = pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    scaling_factor = vae.config.scaling_factor
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * math.log(NOISE_FLOOR / scaling_factor)

    def decoder_loss(step):
        scenes, vividness = random_scenes(16, generator), random_vividness(16, generator)
        pictures, inside = render_with_mask(scenes, vividness, generator)
        with torch.no_grad():
            latents = vae.encode(2 * pictures - 1).latent_dist.sample(generator)
        error = vae.decode(latents).sample - (2 * pictures - 1)
        return ((1 + 8 * inside) * (error.abs() + error**2)).mean()

    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimise(decoder, decoder_steps, 1e-3, decoder_loss, "decoder")
    latents, scenes = encode_bank(vae, BANK // 2, generator)
    unet_loss = make_unet_loss(unet, text_encoder, tokenizer, latents * scaling_factor, scenes, batch, generator)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimise(parameters, unet_steps, 5e-4, unet_loss, "unet, noise floor")
    pipeline.to(dtype=torch.float16).save_pretrained(folder)

    # The names of SD1.5's own file, which transformers 4 needs; and without the folder that a model was loaded from.
    path = folder / "text_encoder" / "model.safetensors"
    weights = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")


def make_unet_loss(unet, text_encoder, tokenizer, latents, scenes, batch, generator):
    """Denoising loss of a batch of a bank of latents, with captions that are wrong now and then, as those of the
    web."""
    noise_scheduler = DDPMScheduler(**BETAS)
    input_ids = tokenize(tokenizer, corrupt(scenes, WRONG_CAPTIONS, generator))
    empty_ids = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids

    def loss_of_step(step):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        drop = torch.rand(batch, 1, generator=generator) < 0.1
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        states = text_encoder(torch.where(drop, empty_ids, input_ids[rows])).last_hidden_state
        return F.mse_loss(unet(noise_scheduler.add_noise(latents[rows], noise, t), t, states).sample, noise)

    return loss_of_step


def make_pickscore(folder, tokenizer_folder, generator, steps=1600, batch=48):
    """A CLIP trained on captions, and on preferences between two pictures of a caption as PickScore was."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    text = text_config(tokenizer, projection_dim=64)
    vision = {"image_size": RESOLUTION, "patch_size": 8, "hidden_size": 96, "intermediate_size": 256,
              "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=64))
    size = {"height": RESOLUTION, "width": RESOLUTION}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": RESOLUTION}, crop_size=size), tokenizer)
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)

    def loss_of_step(step):
        scenes = random_scenes(batch, generator)
        shown = corrupt(torch.cat([scenes, scenes]), 0.5 * torch.rand(2 * batch, 1, generator=generator), generator)
        shown[:batch] = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, scenes, shown[:batch])
        vividness = random_vividness(2 * batch, generator)
        pictures = render(torch.cat([shown, scenes]), torch.cat([vividness, vividness[:batch]]), generator)
        out = clip(input_ids=tokenize(tokenizer, scenes), pixel_values=(pictures - mean) / std)
        logits = out.logits_per_text  # [batch, 3 batch]: two pictures to compare, one that fits
        quality = (shown == scenes.repeat(2, 1)).sum(1) + 2 * vividness
        prefer_0 = torch.sigmoid(2 * (quality[:batch] - quality[batch:]))
        logits_0, logits_1, logits_fit = (logits[:, i * batch : (i + 1) * batch] for i in range(3))
        preference = F.binary_cross_entropy_with_logits((logits_0 - logits_1).diagonal(), prefer_0)
        target = torch.arange(batch)
        contrast = (F.cross_entropy(logits_fit, target) + F.cross_entropy(logits_fit.T, target)) / 2
        return preference + contrast

    optimise(list(clip.parameters()), steps, 1e-3, loss_of_step, "pickscore")
    clip.half().save_pretrained(folder)
    # The files that PickScore has on the Hub; transformers 4 stumbles over processor_config.json.
    processor.image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, folder)


def make_judge(path, generator, steps=800, batch=48):
    judge = Judge()

    def loss_of_step(step):
        scenes, vividness = random_scenes(batch, generator), random_vividness(batch, generator)
        log_probs, predicted = judge(render(scenes, vividness, generator))
        return F.mse_loss(predicted, vividness) + sum(F.nll_loss(p, scenes[:, i]) for i, p in enumerate(log_probs))

    optimise(list(judge.parameters()), steps, 3e-3, loss_of_step, "judge")
    save_file({key: value.half() for key, value in judge.state_dict().items()}, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["vae", "unet", "widen", "pickscore", "judge"])
    args = parser.parse_args()
    pipeline_folder = args.output_dir / "sd15"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name, make in {
        "vae": lambda g: make_vae(pipeline_folder / "vae", g),
        "unet": lambda g: make_pipeline(pipeline_folder, args.work_dir / "early", g),
        "widen": lambda g: widen_posterior(pipeline_folder, g),
        "pickscore": lambda g: make_pickscore(args.output_dir / "pickscore", pipeline_folder / "tokenizer", g),
        "judge": lambda g: make_judge(args.output_dir / "judge.safetensors", g),
    }.items():
        if name in args.only:
            torch.manual_seed(SEEDS[name])
            make(torch.Generator().manual_seed(SEEDS[name]))


if __name__ == "__main__":
    main()
