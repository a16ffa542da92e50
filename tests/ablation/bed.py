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
"""What the ablation runs on: the tiny models, their pairs as latents, held-out prompts, scores, and one training step.

The step is the training scripts' with everything computed once that does not change: the posterior of every image, the
embedding of every prompt. What is left of a step is UNet calls.
"""

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel


ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(TINY)]

from judge import Judge  # noqa: E402
from released_inversion import released_inversion  # noqa: E402
from world import ATTRIBUTES, caption, random_scenes  # noqa: E402

import relabel_pickapic  # noqa: E402
import train_smpo_sd15 as smpo  # noqa: E402


SAMPLING_STEPS = 10  # DDIM, without guidance
IMAGES_PER_PROMPT = 2  # of the evaluation; their distance is the diversity
TUNING_PROMPTS_SEED = 1000
OWN_SEED = 2000  # of the pairs drawn from the base model
OWN_SAMPLING_STEPS = 20
HALF_WAY = 500  # timestep
BATCH = 64  # images in a UNet call without gradient


@dataclass(frozen=True)
class Row:
    """One way to train: where x_t comes from, and what the label says."""

    noising: str = "renoise"  # forward, ddim, renoise, released, or renoise+REMEDY, see `Bed.noised`
    renoise_at: str = "last_move"
    num_inversion_steps: int = 9  # the number of levels of "released"
    guidance: float = 1.0
    labels: str = "hard"  # hard, soft, human, or hard_flip10: the winner is wrong in 10 % of the pairs
    gamma: float = 1.0
    beta: float = 2000.0
    learning_rate: float = 1e-5


@dataclass
class Pairs:
    """P pairs as latents; row i of `mean` and `std` is image 0 of pair i, row P + i its image 1."""

    mean: torch.Tensor  # of the VAE's posterior, scaled, [2P, 4, 8, 8]
    std: torch.Tensor  # of the same; zero for latents that were sampled
    states: torch.Tensor  # embedded prompts, [P, 77, D]
    soft: torch.Tensor  # p_0 by the labelling model, [P]
    human: torch.Tensor  # 0 or 1, drawn by the judge, [P]
    renders: torch.Tensor = None  # images that no model made, bool [2P]

    def __len__(self):
        return len(self.soft)

    def __getitem__(self, chosen):
        """The pairs where the mask `[P]` is true."""
        images = chosen.repeat(2)
        return Pairs(
            self.mean[images], self.std[images], self.states[chosen], self.soft[chosen], self.human[chosen],
            self.renders[images],
        )  # fmt: skip

    def labels(self, kind, seed):
        """p_0 of every pair, float32 `[P]`. A share of the winners of "hard_flip*" is wrong, which ones depends on the seed."""
        if kind in ("soft", "human"):
            return getattr(self, kind)
        hard = (self.soft > 0.5).float()
        if kind == "hard":
            return hard
        share = int(kind.removeprefix("hard_flip")) / 100
        flipped = torch.rand(len(self), generator=torch.Generator().manual_seed(seed)) < share
        return torch.where(flipped, 1 - hard, hard)


@dataclass
class Prompts:
    """Prompts to evaluate on."""

    scenes: torch.Tensor  # [Q, 5]
    states: torch.Tensor  # embedded, [Q, 77, D]
    texts: torch.Tensor  # the labelling model's embeddings, [Q, D]


class Bed:
    """The tiny models in fp32, and what is computed with them once."""

    def __init__(self):
        self.unet = self.new_policy().requires_grad_(False)  # base and reference
        self.vae = AutoencoderKL.from_pretrained(TINY / "sd15" / "vae", torch_dtype=torch.float32).requires_grad_(
            False
        )
        folder = TINY / "sd15"
        self.text = {
            "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
        }
        self.text["text_encoder"].requires_grad_(False)
        self.alpha_bar = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.float()
        self.reward = (
            CLIPModel.from_pretrained(TINY / "pickscore", torch_dtype=torch.float32).requires_grad_(False).eval()
        )
        self.processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
        self.judge = Judge().requires_grad_(False)
        self.judge.load_state_dict(load_file(TINY / "judge.safetensors"))
        self.uncond = self.embed([""])

    @staticmethod
    def new_policy():
        """The base UNet again, to be trained."""
        return UNet2DConditionModel.from_pretrained(TINY / "sd15" / "unet", torch_dtype=torch.float32)

    def embed(self, captions):
        return smpo.encode_prompts(captions, self.text)["encoder_hidden_states"]

    # Pairs and prompts

    def foreign_pairs(self):
        """The tiny training pairs, whose images come from other sources than the base model, labelled by the scripts."""
        with tempfile.TemporaryDirectory() as folder:
            labels_path = f"{folder}/labels.parquet"
            command = ["--dataset_name", str(TINY / "pairs"), "--split", "train", "--output_path", labels_path]
            command += ["--reward_model", str(TINY / "pickscore"), "--dataloader_num_workers", "0"]
            relabel_pickapic.main(relabel_pickapic.parse_args(command))
            command = ["--pretrained_model_name_or_path", str(TINY / "sd15"), "--dataset_name", str(TINY / "pairs")]
            args = smpo.parse_args([*command, "--output_dir", f"{folder}/run", "--labels_path", labels_path])
            table = smpo.open_pairs(args)
            rows, soft = smpo.select_pairs(table, labels_path, args)
        table = table.select(rows)
        pixels = [
            smpo.cut_square(smpo.decode_image(data), 64, (0.5, 0.5), False, "bilinear")[0]
            for column in ("jpg_0", "jpg_1")
            for data in table[column]
        ]
        mean, std = self.encode(torch.stack(pixels) / 127.5 - 1)
        human = torch.tensor(table["label_0"], dtype=torch.float32)
        states = self.embed(list(table["caption"]))
        sources = [*table["model_0"], *table["model_1"]]
        renders = torch.tensor([source.startswith("render") for source in sources])
        return Pairs(mean, std, states, torch.from_numpy(soft), human, renders)

    def own_pairs(self, num_prompts=200, images_per_prompt=3, encode=True):
        """Pairs that the base model sampled itself: all couples of a prompt's images, labelled by the labelling model.

        Their latents are those of the decoded pictures, as they are for anyone who stores samples and trains on them; or
        without `encode` the sampler's own, which so few moves leave with less texture than the data have.
        """
        generator = torch.Generator().manual_seed(OWN_SEED)
        taken = set(read_captions("test"))
        scenes = [scene for scene in random_scenes(2 * num_prompts, generator) if caption(scene) not in taken]
        prompts = self.prompts(torch.stack(scenes[:num_prompts]))
        mean = self.sample(self.unet, prompts, images_per_prompt, generator, OWN_SAMPLING_STEPS)
        std, pictures = torch.zeros_like(mean), self.decode(mean)
        rewards = self.rewards(pictures, prompts, images_per_prompt).view(num_prompts, images_per_prompt)
        if encode:
            mean, std = self.encode(2 * pictures - 1)
        couples = [(i, j) for i in range(images_per_prompt) for j in range(i)]
        first, second = ([couple[k] for couple in couples] for k in (0, 1))
        soft = relabel_pickapic.soft_label(
            rewards[:, first].flatten(), rewards[:, second].flatten(), rewards.min(), rewards.max()
        ).float()

        def stacked(latents):
            latents = latents.view(num_prompts, images_per_prompt, *latents.shape[1:])
            return torch.cat([latents[:, first].flatten(0, 1), latents[:, second].flatten(0, 1)])

        states = prompts.states.repeat_interleave(len(couples), 0)
        return Pairs(stacked(mean), stacked(std), states, soft, (soft > 0.5).float())

    def encode(self, pixels):
        """Mean and standard deviation of the VAE's posterior, scaled, of pictures `[N, 3, 64, 64]` in [-1, 1]."""
        posteriors = [self.vae.encode(some).latent_dist for some in pixels.split(BATCH)]
        scale = self.vae.config.scaling_factor
        return (scale * torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))

    def prompts(self, scenes):
        captions = [caption(scene) for scene in scenes]
        return Prompts(scenes, self.embed(captions), smpo.embed_texts(self.reward, self.processor, captions))

    def report_prompts(self):
        """The prompts of the tiny test split, none of which is trained on."""
        return self.prompts(torch.stack([scene_of(text) for text in dict.fromkeys(read_captions("test"))]))

    def tuning_prompts(self, n=48):
        """New prompts, neither trained on nor reported."""
        taken = {*read_captions("train"), *read_captions("test")}
        scenes = random_scenes(2 * n, torch.Generator().manual_seed(TUNING_PROMPTS_SEED))
        return self.prompts(torch.stack([scene for scene in scenes if caption(scene) not in taken][:n]))

    # Sampling and scoring

    def sample(self, unet, prompts, images_per_prompt, generator, num_steps=SAMPLING_STEPS, with_grad=False):
        """DDIM samples `[Q * images_per_prompt, 4, 8, 8]`, the images of a prompt side by side."""
        states = prompts.states.repeat_interleave(images_per_prompt, 0)
        x_T = torch.randn(len(states), 4, 8, 8, generator=generator)
        with torch.set_grad_enabled(with_grad):
            return torch.cat(
                [self.descend(unet, *some, num_steps) for some in zip(x_T.split(BATCH), states.split(BATCH))]
            )

    def descend(self, unet, x, states, num_steps, t=None):
        """DDIM from timestep t (the last, if None) to clean latents, along the grid that the inversion climbs."""
        T = len(self.alpha_bar)
        t = torch.full((len(x),), T - 1) if t is None else t
        levels = smpo.inversion_timesteps(t, num_steps, T)
        alpha_bar = torch.cat([torch.ones(1), self.alpha_bar])
        for source, destination in zip(levels.T.flip(0)[:-1], levels.T.flip(0)[1:]):
            rows = (source > destination).nonzero()[:, 0]
            if not len(rows):
                continue
            s, d = source[rows], destination[rows]
            eps = smpo.predict_noise(unet, x[rows], s, {"encoder_hidden_states": states[rows]})
            moved = smpo.ddim_move(x[rows], eps, alpha_bar[s + 1], alpha_bar[d + 1])
            x = moved if len(rows) == len(x) else x.index_copy(0, rows, moved)
        return x

    def decode(self, latents):
        """Pictures `[N, 3, 64, 64]` in [0, 1]."""
        pictures = [self.vae.decode(some).sample for some in (latents / self.vae.config.scaling_factor).split(BATCH)]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    def rewards(self, pictures, prompts, images_per_prompt):
        """100 times the labelling model's cosine, `[N]`; gradient flows."""
        mean, std = (
            torch.tensor(value).view(3, 1, 1)
            for value in (self.processor.image_processor.image_mean, self.processor.image_processor.image_std)
        )
        features = self.reward.get_image_features(pixel_values=(pictures - mean) / std)
        texts = prompts.texts.repeat_interleave(images_per_prompt, 0)
        return 100 * (smpo.unit_features(features) * texts).sum(-1)

    @torch.no_grad()
    def evaluate(self, unet, prompts, seed, base_pictures=None):
        """Scores of a UNet on prompts, and its pictures. The initial noise depends on the seed alone.

        Returns:
            A dict of `reward` (100 times the labelling model's cosine), `judge` (score of the judge), `accuracy` (share of
            the attributes that the judge reads off as the prompt has them), `vividness` (by the judge), `diversity` (RMS
            between the two pictures of a prompt), `distance` (RMS to the base's pictures from the same noise); and the
            pictures.
        """
        n, generator = IMAGES_PER_PROMPT, torch.Generator().manual_seed(seed)
        pictures = self.decode(self.sample(unet, prompts, n, generator))
        log_probs, vividness = self.judge(pictures)
        scenes = prompts.scenes.repeat_interleave(n, 0)
        right = torch.stack([p.argmax(1) == scenes[:, i] for i, p in enumerate(log_probs)])
        scores = {
            "reward": self.rewards(pictures, prompts, n).mean().item(),
            "judge": self.judge.score(pictures, scenes).mean().item(),
            "accuracy": right.float().mean().item(),
            "vividness": vividness.mean().item(),
            "diversity": (pictures[::n] - pictures[1::n]).pow(2).mean((1, 2, 3)).sqrt().mean().item(),
        }
        if base_pictures is not None:
            scores["distance"] = (pictures - base_pictures).pow(2).mean((1, 2, 3)).sqrt().mean().item()
        return scores, pictures

    # One step

    def noised(self, row, unet, x_0, states, t, noise):
        """x_t of `row` for latents `[N, ...]`, and the number of UNet calls, guidance counted twice, of one image each.

        What forward noise might mend in an inversion: "mixed" makes it half of the variance of tau, "above" and "below" take it
        alone where t is at least HALF_WAY or less, and "first" for the first move.
        """
        calls = 0
        noising, _, remedy = row.noising.partition("+")

        def predict(x, timesteps, rows):
            nonlocal calls
            calls += len(x) * (1 if row.guidance == 1 else 2)
            eps = smpo.predict_noise(unet, x, timesteps, {"encoder_hidden_states": states[rows]})
            if row.guidance == 1:
                return eps
            uncond = self.uncond.expand(len(x), -1, -1)
            eps_uncond = smpo.predict_noise(unet, x, timesteps, {"encoder_hidden_states": uncond})
            return eps_uncond + row.guidance * (eps - eps_uncond)

        if noising == "released":
            return released_inversion(predict, x_0, t, self.alpha_bar, row.num_inversion_steps), calls
        num_steps = row.num_inversion_steps

        def inverted(rows):
            def predict_rows(x, timesteps, moving):
                return predict(x, timesteps, rows[moving])

            return smpo.invert(predict_rows, x_0[rows], t[rows], self.alpha_bar, num_steps, noising, row.renoise_at)

        if noising != "forward" and not remedy:
            return inverted(torch.arange(len(t))), calls
        x_t = smpo.add_noise(x_0, noise, self.alpha_bar[t])
        if remedy == "first":
            levels = smpo.inversion_timesteps(t, num_steps, len(self.alpha_bar))[:, 1:]
            x_t = climb(
                predict, smpo.add_noise(x_0, noise, self.alpha_bar[levels[:, 0]]), levels, self.alpha_bar, "every"
            )
        elif remedy == "mixed":
            tau = smpo.implied_noise(x_0, inverted(torch.arange(len(t))), self.alpha_bar[t])
            x_t = smpo.add_noise(x_0, (tau + noise) / math.sqrt(2), self.alpha_bar[t])
        elif remedy:
            rows = ((t < HALF_WAY) == (remedy == "above")).nonzero()[:, 0]
            x_t[rows] = inverted(rows) if len(rows) else x_t[rows]
        return x_t, calls

    def errors(self, row, unet, x_0, states, t, noise):
        """Mean squared errors of the policy (with gradient) and the reference for images `[N]`, and UNet calls.

        Returns:
            Policy errors `[N]`, reference errors `[N]`, and the calls in units of one image's forward pass: those of the
            inversion, one of the reference, and three of the policy, whose backward pass costs two.
        """
        with torch.no_grad():
            x_t, calls = self.noised(row, unet, x_0, states, t, noise)
            tau = smpo.implied_noise(x_0, x_t, self.alpha_bar[t])
            ref_pred = smpo.predict_noise(self.unet, x_t, t, {"encoder_hidden_states": states})
        model_pred = smpo.predict_noise(unet, x_t, t, {"encoder_hidden_states": states})
        model_errors, ref_errors = ((pred - tau).pow(2).mean((1, 2, 3)) for pred in (model_pred, ref_pred))
        return model_errors, ref_errors, calls + 4 * len(x_0)

    def loss(self, row, unet, batch):
        """Loss of a batch from `draw_batch`, and its UNet calls."""
        x_0, states, t, noise, soft_label_0 = batch
        model_errors, ref_errors, calls = self.errors(row, unet, x_0, states, t, noise)
        return smpo.smpo_loss(model_errors, ref_errors, soft_label_0, row.beta, row.gamma)[0], calls


@torch.no_grad()
def climb(predict_noise, x, levels, alpha_bar, correction):
    """DDIM moves along `levels` `[N, n + 1]` as of `inversion_timesteps`, every one of them redone with another prediction.

    `correction` is "every" for the prediction at the move's destination, "mean" for its mean with that at the source.
    """
    alpha_bar, x = torch.cat([torch.ones(1), alpha_bar]), x.clone()
    for source, destination in zip(levels.T[:-1], levels.T[1:]):
        rows = (source < destination).nonzero()[:, 0]
        if not len(rows):
            break
        s, d, x_s = source[rows], destination[rows], x[rows]
        eps = predict_noise(x_s, s.clamp(min=0), rows)
        x_d = smpo.ddim_move(x_s, eps, alpha_bar[s + 1], alpha_bar[d + 1])
        eps_d = predict_noise(x_d, d, rows)
        eps = {"every": eps_d, "mean": (eps + eps_d) / 2}[correction]
        x[rows] = smpo.ddim_move(x_s, eps, alpha_bar[s + 1], alpha_bar[d + 1])
    return x


def draw_batch(pairs, labels, chosen, seed, step, num_train_timesteps=1000):
    """Pairs `chosen` as `Bed.loss` wants them: draws from the posterior, timesteps and noise depend on (seed, step) alone."""
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


def read_captions(split):
    return pq.read_table(TINY / "pairs" / f"{split}.parquet", columns=["caption"])["caption"].to_pylist()


def scene_of(text):
    """The scene `[5]` that `world.caption` describes so."""
    words = text.removeprefix("a ").removesuffix(" background")
    size, color, shape, rest = words.split(" ", 3)
    position, background = rest.split(" on a ")
    names = [size, color, shape, position, background]
    return torch.tensor([list(known).index(name) for known, name in zip(ATTRIBUTES, names)])
