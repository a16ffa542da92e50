# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""What the ablation runs on: the tiny models, pairs as latents, prompts that no pair has, scores, one training step.

The step is the training scripts' with everything computed once that does not change: the posterior of every image, the
embedding of every prompt. What is left of a step is UNet calls. All of it is in PyTorch's default precision.
"""

import copy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel


ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(TINY)]

from judge import Judge  # noqa: E402
from world import ATTRIBUTES, caption, random_scenes  # noqa: E402

import relabel_pickapic  # noqa: E402
import train_smpo_sd15 as smpo  # noqa: E402
from relabel_pickapic import embed_texts, unit_features  # noqa: E402


SAMPLING_STEPS = 10  # DDIM, without guidance
IMAGES_PER_PROMPT = 2  # of the evaluation; their distance is the diversity
TUNING_PROMPTS_SEED = 1000
OWN_SEED = 2000  # of the pairs drawn from the base model
OWN_SAMPLING_STEPS = 20
BATCH = 64  # images in a UNet call without gradient


@dataclass(frozen=True)
class Row:
    """One way to train: where x_t comes from, and what the label says."""

    noising: str = "renoise"  # forward, or as of `invert`
    renoise_at: str = "last_move"
    num_inversion_steps: int = 9
    noise_share: float = 0.0  # of the variance of an inversion's tau that is forward noise instead
    labels: str = "hard"  # the labelling model's winner, or "soft", its p_0
    gamma: float = 1.0
    beta: float = 2000.0
    learning_rate: float = 1e-5


@dataclass
class Pairs:
    """P pairs as latents; row i of `mean` and `std` is image 0 of pair i, row P + i its image 1."""

    mean: torch.Tensor  # of the VAE's posterior, scaled, [2P, 4, 8, 8]
    std: torch.Tensor
    states: torch.Tensor  # embedded prompts, [P, 77, D]
    soft: torch.Tensor  # p_0 by the labelling model, [P]

    def __len__(self):
        return len(self.soft)

    def labels(self, kind):
        """p_0 of every pair, `[P]`."""
        return {"soft": self.soft, "hard": (self.soft > 0.5).to(self.soft.dtype)}[kind]


@dataclass
class Prompts:
    """Q prompts."""

    scenes: torch.Tensor  # [Q, 5]
    states: torch.Tensor  # embedded, [Q, 77, D]
    texts: torch.Tensor  # the labelling model's embeddings, [Q, D]


class Bed:
    """The tiny models, and what is computed with them once."""

    def __init__(self):
        def load(network_class, *folders):
            network = network_class.from_pretrained(TINY.joinpath(*folders))
            return network.to(torch.get_default_dtype()).requires_grad_(False)

        self.unet = load(UNet2DConditionModel, "sd15", "unet")  # base and reference
        self.vae = load(AutoencoderKL, "sd15", "vae")
        self.text = {
            "tokenizer": CLIPTokenizer.from_pretrained(TINY / "sd15" / "tokenizer"),
            "text_encoder": load(CLIPTextModel, "sd15", "text_encoder"),
        }
        alpha_bar = DDPMScheduler.from_pretrained(TINY / "sd15" / "scheduler").alphas_cumprod
        self.alpha_bar = alpha_bar.to(torch.get_default_dtype())
        self.reward = load(CLIPModel, "pickscore")
        self.processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
        self.judge = Judge().requires_grad_(False)
        self.judge.load_state_dict(load_file(TINY / "judge.safetensors"))

    def new_policy(self):
        """The base UNet again, to be trained."""
        return copy.deepcopy(self.unet).requires_grad_(True)

    # Pairs and prompts

    @torch.no_grad()
    def foreign_pairs(self, split="train"):
        """The tiny pairs of a split, whose images the base model did not make, with the scripts' labels."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/labels.parquet"
            command = (
                f"--dataset_name {TINY}/pairs --split {split} --reward_model {TINY}/pickscore --output_path {path}"
            )
            relabel_pickapic.main(relabel_pickapic.parse_args(command.split()))
            labels = pd.read_parquet(path)
        trained_on = labels["valid"] & (labels["label_0"] != 0.5)
        table = read_pairs(split)[trained_on]
        images = [smpo.decode_image(data, []) for column in ("jpg_0", "jpg_1") for data in table[column]]
        pictures = torch.stack([smpo.cut_square(image, 64, mirror=False) for image in images]) / 255
        states = self.prompts([scene_of(text) for text in table["caption"]]).states
        soft = torch.tensor(labels["soft_label_0"][trained_on].to_numpy(), dtype=pictures.dtype)
        return Pairs(*self.encode(pictures), states, soft)

    @torch.no_grad()
    def own_pairs(self, num_prompts=200, images_per_prompt=3):
        """Pairs that the base model drew: all couples of a prompt's images, decoded and encoded like stored ones."""
        generator = torch.Generator().manual_seed(OWN_SEED)
        prompts = self.new_prompts(num_prompts, ["test"], generator)
        latents = self.sample(self.unet, prompts, images_per_prompt, generator, OWN_SAMPLING_STEPS)
        pictures = self.decode(latents)
        rewards = self.rewards(pictures, prompts.texts.repeat_interleave(images_per_prompt, 0))
        couples = [(i, j) for i in range(images_per_prompt) for j in range(i)]
        places = torch.arange(len(pictures)).view(num_prompts, images_per_prompt)
        first, second = (places[:, [couple[k] for couple in couples]].flatten() for k in (0, 1))
        mean, std = (values[torch.cat([first, second])] for values in self.encode(pictures))
        states = prompts.states.repeat_interleave(len(couples), 0)
        soft = relabel_pickapic.soft_label(rewards[first], rewards[second], rewards.min(), rewards.max())
        return Pairs(mean, std, states, soft.to(mean.dtype))

    def encode(self, pictures):
        """Mean and standard deviation of the VAE's posterior, scaled, of pictures `[N, 3, 64, 64]` in [0, 1]."""
        posteriors = [self.vae.encode(2 * some - 1).latent_dist for some in pictures.split(BATCH)]
        scale = self.vae.config.scaling_factor
        return [scale * torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std")]

    def prompts(self, scenes):
        captions = [caption(scene) for scene in scenes]
        states = smpo.encode_prompts(captions, self.text)["encoder_hidden_states"]
        return Prompts(torch.stack(list(scenes)), states, embed_texts(self.reward, self.processor.tokenizer, captions))

    def new_prompts(self, n, taken, generator):
        """Prompts that no pair of the splits `taken` has."""
        taken = {text for split in taken for text in read_pairs(split)["caption"]}
        scenes = [scene for scene in random_scenes(2 * n, generator) if caption(scene) not in taken]
        return self.prompts(scenes[:n])

    def report_prompts(self):
        """The prompts of the tiny test split, none of which is trained on."""
        return self.prompts([scene_of(text) for text in dict.fromkeys(read_pairs("test")["caption"])])

    def tuning_prompts(self, n=48):
        """New prompts, neither trained on nor reported."""
        return self.new_prompts(n, ["train", "test"], torch.Generator().manual_seed(TUNING_PROMPTS_SEED))

    # Sampling and scoring

    def sample(self, unet, prompts, images_per_prompt, generator, num_steps=SAMPLING_STEPS):
        """DDIM samples `[Q * images_per_prompt, 4, 8, 8]`, the images of a prompt side by side."""
        states = prompts.states.repeat_interleave(images_per_prompt, 0)
        x_T = torch.randn(len(states), 4, 8, 8, generator=generator)
        return torch.cat([self.descend(unet, *some, num_steps) for some in zip(x_T.split(BATCH), states.split(BATCH))])

    @torch.no_grad()
    def descend(self, unet, x, states, num_steps, t=None):
        """DDIM from timestep t (the last, if None) to clean latents, along the grid that the inversion climbs."""
        T = len(self.alpha_bar)
        t = torch.full((len(x),), T - 1) if t is None else t
        levels = smpo.inversion_timesteps(t, num_steps, T).T.flip(0)
        alpha_bar, x = torch.cat([torch.ones(1), self.alpha_bar]), x.clone()
        for source, destination in zip(levels[:-1], levels[1:]):
            rows = (source > destination).nonzero()[:, 0]
            if len(rows):
                s, d = source[rows], destination[rows]
                eps = smpo.call_unet(unet, x[rows], s, {"encoder_hidden_states": states[rows]})
                x[rows] = smpo.ddim_move(x[rows], eps, alpha_bar[s + 1], alpha_bar[d + 1])
        return x

    def decode(self, latents):
        """Pictures `[N, 3, 64, 64]` in [0, 1]."""
        pictures = [self.vae.decode(some).sample for some in (latents / self.vae.config.scaling_factor).split(BATCH)]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    def rewards(self, pictures, texts):
        """100 times the labelling model's cosine, `[N]`, of pictures and embedded texts `[N, D]`."""
        processor = self.processor.image_processor
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
        features = self.reward.get_image_features(pixel_values=(pictures - mean) / std)
        return 100 * (unit_features(features) * texts).sum(-1)

    @torch.no_grad()
    def evaluate(self, unet, prompts, seed, base_pictures=None):
        """Scores of a UNet on prompts, and its pictures. The initial noise depends on the seed alone.

        Returns:
            A dict of `reward` (100 times the labelling model's cosine), `judge` (score of the judge), `accuracy`
            (share of the attributes that the judge reads off as the prompt has them), `diversity` (RMS between the
            pictures of a prompt), `distance` (RMS to the base's pictures from the same noise); and the pictures.
        """
        n, generator = IMAGES_PER_PROMPT, torch.Generator().manual_seed(seed)
        pictures = self.decode(self.sample(unet, prompts, n, generator))
        scenes = prompts.scenes.repeat_interleave(n, 0)
        right = torch.stack([p.argmax(1) == scenes[:, i] for i, p in enumerate(self.judge(pictures)[0])])
        scores = {
            "reward": self.rewards(pictures, prompts.texts.repeat_interleave(n, 0)).mean().item(),
            "judge": self.judge.score(pictures, scenes).mean().item(),
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

        if row.noising == "forward":
            return smpo.add_noise(x_0, noise, self.alpha_bar[t]), calls
        options = row.num_inversion_steps, row.noising, row.renoise_at
        x_t = smpo.invert(predict_noise, x_0, t, self.alpha_bar, *options)
        if row.noise_share:
            tau = smpo.implied_noise(x_0, x_t, self.alpha_bar[t])
            tau = (1 - row.noise_share) ** 0.5 * tau + row.noise_share**0.5 * noise
            x_t = smpo.add_noise(x_0, tau, self.alpha_bar[t])
        return x_t, calls

    def errors(self, row, unet, batch):
        """Mean squared errors of the policy, with gradient, and of the reference for images `[2B]`; UNet calls.

        A call is one image's forward pass: those of the inversion, one of the reference, and three of the policy,
        whose backward pass costs two.
        """
        x_0, states, t, noise, _ = batch
        cond = {"encoder_hidden_states": states}
        x_t, calls = self.noised(row, unet, x_0, states, t, noise)
        tau = smpo.implied_noise(x_0, x_t, self.alpha_bar[t])
        with torch.no_grad():
            ref_errors = smpo.squared_errors(smpo.call_unet(self.unet, x_t, t, cond), tau)
        model_errors = smpo.squared_errors(smpo.call_unet(unet, x_t, t, cond), tau)
        return model_errors, ref_errors, calls + 4 * len(x_0)

    def loss(self, row, unet, batch):
        """Loss of a batch from `draw_batch`, and its UNet calls."""
        model_errors, ref_errors, calls = self.errors(row, unet, batch)
        return smpo.smpo_loss(model_errors, ref_errors, batch[-1], row.beta, row.gamma)[0], calls


def mean_distance(pictures, others):
    """RMS between pictures, averaged over them."""
    return (pictures - others).pow(2).mean((1, 2, 3)).sqrt().mean().item()


def draw_batch(pairs, labels, chosen, seed, step, num_train_timesteps=1000):
    """Pairs `chosen` for `Bed.loss`: x_0, embedded prompts, timesteps and noise of 2B images, labels of B pairs.

    Draws from the posterior, timesteps and noise depend on (seed, step) alone.
    """
    generator = torch.Generator().manual_seed(1_000_000 * seed + step)
    images = torch.cat([chosen, chosen + len(pairs)])
    mean, std = pairs.mean[images], pairs.std[images]
    x_0 = mean + std * torch.randn(mean.shape, generator=generator)
    t = torch.randint(num_train_timesteps, (len(chosen),), generator=generator).repeat(2)
    noise = torch.randn(len(chosen), *mean.shape[1:], generator=generator).repeat(2, 1, 1, 1)
    return x_0, pairs.states[chosen].repeat(2, 1, 1), t, noise, labels[chosen]


def order_of(num_pairs, num_drawn, seed):
    """Which pairs are trained on, in order: permutations of all, one after another, int64 `[num_drawn]`."""
    rng = np.random.default_rng([seed, 1])
    permutations = [rng.permutation(num_pairs) for _ in range(-(-num_drawn // num_pairs))]
    return torch.from_numpy(np.concatenate(permutations)[:num_drawn])


def read_pairs(split):
    return pd.read_parquet(TINY / "pairs" / f"{split}.parquet")


def scene_of(text):
    """The scene `[5]` that `world.caption` describes so."""
    words = text.removeprefix("a ").removesuffix(" background")
    size, color, shape, rest = words.split(" ", 3)
    position, background = rest.split(" on a ")
    names = [size, color, shape, position, background]
    return torch.tensor([list(known).index(name) for known, name in zip(ATTRIBUTES, names)])
