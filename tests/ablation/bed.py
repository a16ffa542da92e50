# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""What the ablation runs on: a small base model, pairs as latents, prompts that no pair has, scores, one step.

The step is the training scripts' with everything computed once that does not change: the posterior of every image, the
embedding of every prompt. What is left of a step is UNet calls, in PyTorch's default precision. `Bed` is the tiny
Stable Diffusion 1.5 on a CPU, `BigBed` a UNet ten times as large that a GPU trains from nothing.
"""

import copy
import functools
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from make_tables import COMMON_RATE
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from diffusers import StableDiffusionPipeline, UNet2DConditionModel


ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(TINY)]

from judge import Judge  # noqa: E402
from make_models import WRONG_CAPTIONS  # noqa: E402
from make_pairs import TIE_MARGIN  # noqa: E402
from world import ATTRIBUTES, RESOLUTION, caption, corrupt, random_scenes, random_vividness, render  # noqa: E402

import relabel_pickapic  # noqa: E402
import train_smpo_sd15 as smpo  # noqa: E402


SAMPLING_STEPS, OWN_SAMPLING_STEPS = 10, 20  # DDIM, without guidance: of the evaluation, of pairs drawn beforehand
IMAGES_PER_PROMPT = 2  # of the evaluation; their distance is the diversity
TUNING_PROMPTS_SEED, OWN_SEED, FOREIGN_SEED, BASE_SEED = 1000, 2000, 4000, 5000
BATCH = 64  # images in a UNet call without gradient
SCENES = {caption(scene): scene for scene in torch.cartesian_prod(*(torch.arange(len(names)) for names in ATTRIBUTES))}


@dataclass(frozen=True)
class Row:
    """One way to train: where x_t comes from, and what the label says."""

    noising: str = "renoise"  # forward, or as of `invert`
    renoise_at: str = "last_move"
    num_inversion_steps: int = 9
    noise_share: float = 0.0  # of the variance of an inversion's tau that is forward noise instead
    overshoot: int = 0  # levels of the released code: x_t is inverted to the one where that code ends, and scored as t
    inverted_by: str = "policy"  # or "reference", so that x_t does not change as the policy does
    labels: str = "hard"  # the labelling model's winner, or "soft", its p_0
    gamma: float = 1.0
    beta: float = 200.0
    learning_rate: float = COMMON_RATE


class Pairs(NamedTuple):
    """P pairs as latents."""

    mean: torch.Tensor  # of the VAE's posterior of image 0 and image 1, scaled, [P, 2, 4, h, w]
    std: torch.Tensor
    states: torch.Tensor  # embedded prompts, [P, 77, D]
    soft: torch.Tensor  # p_0 by the labelling model, [P]


class Prompts(NamedTuple):
    """Q prompts."""

    scenes: torch.Tensor  # [Q, 5]
    states: torch.Tensor  # embedded, [Q, 77, D]
    texts: torch.Tensor  # the labelling model's embeddings, [Q, D]


def chosen(some, rows):
    """Some of these pairs or prompts."""
    return type(some)(*(tensor[rows] for tensor in some))


def joined(*several):
    return Pairs(*map(torch.cat, zip(*several)))


def stacked(images):
    """Images `[P, 2, ...]` of pairs as a batch `[2P, ...]`, first all of image 0."""
    return images.transpose(0, 1).flatten(0, 1)


class Bed:
    """The tiny models, and what is computed with them once. Random numbers are drawn on the CPU."""

    latent_size, resolution = 8, RESOLUTION

    def __init__(self, device="cpu"):
        self.device, dtype = device, torch.get_default_dtype()
        pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15").to(device, dtype)
        self.unet, self.vae = pipeline.unet, pipeline.vae  # base and reference; decoder
        self.text = {"tokenizer": pipeline.tokenizer, "text_encoder": pipeline.text_encoder}
        self.alpha_bar = pipeline.scheduler.alphas_cumprod.to(device, dtype)
        self.reward = CLIPModel.from_pretrained(TINY / "pickscore").to(device, dtype)
        self.processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
        self.judge = Judge()
        self.judge.load_state_dict(load_file(TINY / "judge.safetensors"))
        for network in (self.unet, self.vae, pipeline.text_encoder, self.reward, self.judge.to(device)):
            network.requires_grad_(False)

    def new_policy(self):
        """The base UNet again, to be trained."""
        return copy.deepcopy(self.unet).requires_grad_(True)

    # Pairs and prompts

    @torch.no_grad()
    def stored_pairs(self, split="train"):
        """The tiny pairs of a split that the scripts train on, with the scripts' labels."""
        labels = stored_labels(split)
        trained_on = labels["valid"] & (labels["label_0"] != 0.5)
        table = read_pairs(split)[trained_on]
        images = [smpo.decode_image(data) for column in ("jpg_0", "jpg_1") for data in table[column]]
        pictures = torch.stack([smpo.cut_square(image, RESOLUTION, mirror=False) for image in images]) / 255
        soft = torch.tensor(labels["soft_label_0"][trained_on].to_numpy(), dtype=pictures.dtype)
        return self.as_pairs(pictures, self.prompts([SCENES[text] for text in table["caption"]]), soft)

    def foreign_pairs(self):
        """Pairs of images that the base model did not make: the stored ones, and fresh ones of two sources."""
        return joined(self.stored_pairs(), self.rendered_pairs(2000))

    @torch.no_grad()
    def rendered_pairs(self, num_prompts):
        """Pairs by the two painters of `make_pairs.py`, without those that are ties to the judge, as there."""
        generator = torch.Generator().manual_seed(FOREIGN_SEED)
        prompts = self.training_prompts(num_prompts, generator)
        scenes = prompts.scenes.repeat(2, 1)
        careful = torch.rand(len(scenes), generator=generator) < 0.5
        shown = torch.where(careful[:, None], scenes, corrupt(scenes, 0.4, generator))
        vividness = random_vividness(len(scenes), generator)
        vividness = torch.where(careful, 0.3 + 0.7 * vividness, 0.7 * vividness)
        pictures = render(shown, vividness, generator, self.resolution)
        scores = torch.cat([self.judged(*some)[0] for some in in_batches(pictures, scenes)])
        kept = (scores.view(2, -1).diff(dim=0)[0].abs() >= TIE_MARGIN).cpu()
        return self.labelled(chosen(prompts, kept), pictures[kept.repeat(2)], stored_range())

    @torch.no_grad()
    def own_pairs(self, num_prompts=512, images_per_prompt=3):
        """Pairs that the base model drew: all couples of a prompt's images, decoded and encoded like stored ones."""
        generator = torch.Generator().manual_seed(OWN_SEED)
        prompts = self.training_prompts(num_prompts, generator)
        pictures = self.decode(self.sample(self.unet, prompts, images_per_prompt, generator, OWN_SAMPLING_STEPS))
        couples = torch.tril_indices(images_per_prompt, images_per_prompt, -1)  # [2, couples]
        first = torch.arange(num_prompts).repeat_interleave(couples.shape[1])
        places = images_per_prompt * first + couples.repeat(1, num_prompts)
        return self.labelled(chosen(prompts, first), pictures[places.flatten()])

    def labelled(self, prompts, pictures, score_range=None):
        """Pairs of pictures `[2Q, ...]`, one of each prompt, labelled for a range of rewards, if None their own."""
        rewards = torch.cat([self.rewards(*some) for some in in_batches(pictures, prompts.texts.repeat(2, 1))])
        score_range = score_range or (rewards.min().item(), rewards.max().item())
        return self.as_pairs(pictures, prompts, relabel_pickapic.soft_label(*rewards.chunk(2), *score_range))

    def as_pairs(self, pictures, prompts, soft):
        mean, std = (torch.stack(images.chunk(2), 1) for images in self.encode(pictures))
        return Pairs(mean, std, prompts.states, soft.to(mean))

    def encode(self, pictures):
        """Mean and standard deviation of the VAE's posterior, scaled, of pictures `[N, 3, H, W]` in [0, 1]."""
        posteriors = [self.vae.encode(2 * some.to(self.device) - 1).latent_dist for some in pictures.split(BATCH)]
        scale = self.vae.config.scaling_factor
        return [scale * torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std")]

    def prompts(self, scenes):
        captions = [caption(scene) for scene in scenes]
        states = smpo.encode_prompts(captions, self.text)["encoder_hidden_states"]
        texts = relabel_pickapic.embed_texts(self.reward, self.processor.tokenizer, captions)
        return Prompts(torch.stack(list(scenes)), states, texts)

    def report_prompts(self):
        """The prompts of the tiny test split, none of which is trained on."""
        return self.prompts(report_scenes())

    def tuning_prompts(self):
        """New prompts, neither trained on nor reported."""
        return self.prompts(tuning_scenes())

    def training_prompts(self, n, generator):
        """Prompts, some more than once, that are neither reported nor tuned on."""
        return self.prompts(fresh_scenes(n, generator, {*map(caption, report_scenes() + tuning_scenes())}))

    # Sampling and scoring

    def sample(self, unet, prompts, images_per_prompt, generator, num_steps=SAMPLING_STEPS):
        """DDIM samples `[Q * images_per_prompt, 4, h, w]`, the images of a prompt side by side."""
        states = prompts.states.repeat_interleave(images_per_prompt, 0)
        x_T = torch.randn(len(states), 4, self.latent_size, self.latent_size, generator=generator).to(self.device)
        return torch.cat([self.descend(unet, *some, num_steps) for some in in_batches(x_T, states)])

    @torch.no_grad()
    def descend(self, unet, x, states, num_steps, t=None):
        """DDIM from timestep t (the last, if None) to clean latents, along the grid that the inversion climbs."""
        T = len(self.alpha_bar)
        t = torch.full((len(x),), T - 1) if t is None else t
        levels = smpo.inversion_timesteps(t, num_steps, T).T.flip(0).to(self.device)
        alpha_bar, x = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar]), x.clone()
        for source, destination in zip(levels[:-1], levels[1:]):
            rows = (source > destination).nonzero()[:, 0]
            if len(rows):
                s, d = source[rows], destination[rows]
                eps = smpo.call_unet(unet, x[rows], s, {"encoder_hidden_states": states[rows]})
                x[rows] = smpo.ddim_move(x[rows], eps, alpha_bar[s + 1], alpha_bar[d + 1])
        return x

    def decode(self, latents):
        """Pictures `[N, 3, H, W]` in [0, 1]."""
        pictures = [self.vae.decode(some).sample for some in (latents / self.vae.config.scaling_factor).split(BATCH)]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    def rewards(self, pictures, texts):
        """100 times the labelling model's cosine, `[N]`, of pictures and embedded texts `[N, D]`."""
        processor = self.processor.image_processor
        scale = [processor.image_mean, processor.image_std]
        mean, std = torch.tensor(scale, device=self.device).view(2, 3, 1, 1)
        features = self.reward.get_image_features(pixel_values=(self.as_scored(pictures) - mean) / std)
        return 100 * (relabel_pickapic.unit_features(features) * texts).sum(-1)

    def judged(self, pictures, scenes):
        """The judge's scores of pictures for scenes `[N, 5]`, and which attributes it reads off so: `[N, 5]`."""
        pictures, scenes = self.as_scored(pictures), scenes.to(self.device)
        read = torch.stack([log_probs.argmax(1) for log_probs in self.judge(pictures)[0]], dim=1)
        return self.judge.score(pictures, scenes), read == scenes

    def as_scored(self, pictures):
        """In the size that the labelling model and the judge know."""
        return F.interpolate(pictures.to(self.device), RESOLUTION, mode="area")

    @torch.no_grad()
    def evaluate(self, unet, prompts, seed, base_pictures=None):
        """Scores of a UNet on prompts, and its pictures. The initial noise depends on the seed alone.

        The scores are `reward` (100 times the labelling model's cosine), `judge`, `accuracy` (share of the attributes
        that the judge reads off as the prompt has them), `diversity` (RMS between the pictures of a prompt) and
        `distance` (RMS to the base's pictures from the same noise).
        """
        n, generator = IMAGES_PER_PROMPT, torch.Generator().manual_seed(seed)
        pictures = self.decode(self.sample(unet, prompts, n, generator))
        judge_scores, right = self.judged(pictures, prompts.scenes.repeat_interleave(n, 0))
        scores = {
            "reward": self.rewards(pictures, prompts.texts.repeat_interleave(n, 0)).mean().item(),
            "judge": judge_scores.mean().item(),
            "accuracy": right.double().mean().item(),
            "diversity": mean_distance(pictures[::n], pictures[1::n]),
        }
        if base_pictures is not None:
            scores["distance"] = mean_distance(pictures, base_pictures)
        return scores, pictures

    # One step

    @torch.no_grad()
    def noised(self, row, unet, x_0, states, t, noise):
        """x_t of `row` for latents `[N, ...]`, and the number of UNet calls of one image each."""
        calls = 0

        def predict_noise(x, timesteps, rows):
            nonlocal calls
            calls += len(x)
            return smpo.call_unet(unet, x, timesteps, {"encoder_hidden_states": states[rows]})

        alpha_bar_t = self.alpha_bar[t.to(self.device)]
        if row.noising == "forward":
            return smpo.add_noise(x_0, noise, alpha_bar_t), calls
        options = row.num_inversion_steps, row.noising, row.renoise_at
        reached = smpo.released_timesteps(t, row.overshoot, len(self.alpha_bar))[:, -1] if row.overshoot else t
        x_t = smpo.invert(predict_noise, x_0, reached, self.alpha_bar, *options)
        if row.noise_share:
            tau = partly_random(smpo.implied_noise(x_0, x_t, alpha_bar_t), noise, row.noise_share)
            x_t = smpo.add_noise(x_0, tau, alpha_bar_t)
        return x_t, calls

    def errors(self, row, unet, batch):
        """Errors of policy and reference `[2B]` on a batch from `draw_batch`, and UNet calls of the inversion."""
        x_0, states, t, noise, _ = batch
        cond = {"encoder_hidden_states": states}
        models = {"policy": unet, "reference": self.unet}
        x_t, calls = self.noised(row, models[row.inverted_by], x_0, states, t, noise)
        t = t.to(self.device)
        tau = smpo.implied_noise(x_0, x_t, self.alpha_bar[t])
        with torch.no_grad():
            ref_errors = smpo.squared_errors(smpo.call_unet(self.unet, x_t, t, cond), tau)
        return smpo.squared_errors(smpo.call_unet(unet, x_t, t, cond), tau), ref_errors, calls

    def loss(self, row, unet, batch):
        """Loss of a batch from `draw_batch`, and its UNet calls.

        A call is one image's forward pass: those of the inversion, one of the reference, and three of the policy,
        whose backward pass costs two.
        """
        model_errors, ref_errors, calls = self.errors(row, unet, batch)
        loss, _ = smpo.smpo_loss(model_errors, ref_errors, batch[-1], row.beta, row.gamma)
        return loss, calls + 4 * len(ref_errors)


class BigBed(Bed):
    """Scenes of 128 pixels in the tiny VAE's latents, and a UNet of 39 M parameters that learned them from nothing.

    Its training stops at the time `end` with a message, is saved at `path` then, and goes on from there.
    """

    latent_size, resolution = 16, 128
    architecture = {"block_out_channels": [192, 384], "layers_per_block": 2, "sample_size": 16}
    num_steps, batch_size, num_latents, learning_rate = 6000, 256, 32_768, 4e-4
    num_rendered, num_own_prompts = 4096, 700

    def __init__(self, device, path, end=None):
        super().__init__(device)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(BASE_SEED)
        self.unet = UNet2DConditionModel.from_config({**self.unet.config, **self.architecture}).to(device)
        self.train_base(path, end)
        self.unet.requires_grad_(False)

    def foreign_pairs(self):
        """Fresh pairs of the two painters; the stored ones have another size."""
        return self.rendered_pairs(self.num_rendered)

    def own_pairs(self):
        return super().own_pairs(self.num_own_prompts)

    def train_base(self, path, end):
        """Each step draws by its own number, so that the training can go on."""
        optimizer, done = torch.optim.AdamW(self.unet.parameters(), weight_decay=1e-2), 0
        if path.exists():
            saved = torch.load(path, map_location="cpu")  # AdamW counts its steps there
            self.unet.load_state_dict(saved["unet"])
            optimizer.load_state_dict(saved["optimizer"])
            done = saved["step"]
        if done < self.num_steps:
            mean, std, scenes = self.rendered_latents()
        for step in range(done, self.num_steps):
            generator = torch.Generator().manual_seed(BASE_SEED + step)
            rows = torch.randint(len(mean), (self.batch_size,), generator=generator)
            t = torch.randint(len(self.alpha_bar), (len(rows),), generator=generator).to(self.device)
            draws = torch.randn(2, len(rows), *mean.shape[1:], generator=generator).to(self.device)
            captions = [caption(scene) for scene in corrupt(scenes[rows], WRONG_CAPTIONS, generator)]
            x_t = smpo.add_noise(mean[rows] + std[rows] * draws[0], draws[1], self.alpha_bar[t])
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                eps = smpo.call_unet(self.unet, x_t, t, smpo.encode_prompts(captions, self.text))
            F.mse_loss(eps.float(), draws[1]).backward()
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            decay = 0.5 + 0.5 * math.cos(math.pi * step / self.num_steps)
            optimizer.param_groups[0]["lr"] = self.learning_rate * min(1, (step + 1) / 200) * decay
            optimizer.step()
            optimizer.zero_grad()
            done, late = step + 1, end is not None and time.monotonic() > end
            if late or done == self.num_steps:
                parts = {"unet": self.unet.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({"step": done, **parts}, path)
            if late and done < self.num_steps:
                print(f"base model: step {done} of {self.num_steps}; the same command goes on.")
                raise SystemExit

    @torch.no_grad()
    def rendered_latents(self):
        """Posteriors of pictures that the base learns from: mean and standard deviation; and their scenes."""
        generator = torch.Generator().manual_seed(BASE_SEED)
        scenes = random_scenes(self.num_latents, generator)
        batches = []
        for some in scenes.split(BATCH):
            pictures = render(some, random_vividness(len(some), generator), generator, self.resolution)
            batches.append(self.encode(pictures))
        return *map(torch.cat, zip(*batches)), scenes


def in_batches(*tensors):
    return zip(*(tensor.split(BATCH) for tensor in tensors))


def partly_random(tau, noise, share):
    """`tau` with a share of its variance from `noise` instead."""
    return (1 - share) ** 0.5 * tau + share**0.5 * noise


def fresh_scenes(n, generator, taken):
    """Scenes that no caption in `taken` describes."""
    return [scene for scene in random_scenes(2 * n, generator) if caption(scene) not in taken][:n]


def report_scenes():
    return [SCENES[text] for text in dict.fromkeys(read_pairs("test")["caption"])]


def tuning_scenes():
    taken = {text for split in ("train", "test") for text in read_pairs(split)["caption"]}
    return fresh_scenes(48, torch.Generator().manual_seed(TUNING_PROMPTS_SEED), taken)


@functools.cache
def read_pairs(split):
    return pd.read_parquet(TINY / "pairs" / f"{split}.parquet")


@functools.cache
def stored_labels(split):
    """What `relabel_pickapic.py` says of the tiny pairs of a split."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/labels.parquet"
        command = f"--dataset_name {TINY}/pairs --split {split} --reward_model {TINY}/pickscore --output_path {path}"
        relabel_pickapic.main(relabel_pickapic.parse_args(command.split()))
        return pd.read_parquet(path)


def stored_range():
    """Least and largest reward of the stored images that are trained on."""
    labels = stored_labels("train")
    rewards = 100 * labels.loc[labels["valid"], ["score_0", "score_1"]].to_numpy()
    return rewards.min(), rewards.max()


def mean_distance(pictures, others):
    """RMS between pictures, averaged over them."""
    return (pictures - others).pow(2).mean((1, 2, 3)).sqrt().mean().item()


def draw_batch(pairs, labels, seed, step, num_train_timesteps=1000):
    """Pairs for `Bed.loss`: x_0, embedded prompts, timesteps and noise of 2B images, p_0 of B pairs.

    "soft" `labels` are the labelling model's p_0, "hard" ones its winner. Draws from the posterior, timesteps and
    noise depend on (seed, step) alone.
    """
    generator = torch.Generator().manual_seed(1_000_000 * seed + step)
    mean, std = stacked(pairs.mean), stacked(pairs.std)
    x_0 = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
    t = torch.randint(num_train_timesteps, (len(pairs.soft),), generator=generator).repeat(2)
    noise = torch.randn(len(pairs.soft), *mean.shape[1:], generator=generator).repeat(2, 1, 1, 1).to(mean.device)
    p_0 = {"soft": pairs.soft, "hard": (pairs.soft > 0.5).to(pairs.soft.dtype)}[labels]
    return x_0, pairs.states.repeat(2, 1, 1), t, noise, p_0


def order_of(num_pairs, num_drawn, seed):
    """Which pairs are trained on, in order and none twice, int64 `[num_drawn]`."""
    return torch.from_numpy(np.random.default_rng([seed, 1]).permutation(num_pairs)[:num_drawn])
