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
"""Runs the ablation of SmPO-Diffusion on the tiny models, part by part, and appends every result to a CSV.

    python tests/ablation/run_ablation.py all      # or some of: inversion tune grid signal ascent published own hyper labels long
    python tests/ablation/make_tables.py           # tables and plots of what is there

A result that is in the CSV is not computed again, so a stopped run goes on where it was, and a second process with --backwards
meets the first. `tune` chooses learning rate and beta of every row by the mean of some seeds, on prompts that are not reported;
the parts after it take what it chose.
"""

import argparse
import csv
import dataclasses
import itertools
import logging
import math
import time
from pathlib import Path

import torch
from bed import Bed, Row, climb, draw_batch, order_of, random_scenes, smpo
from make_tables import EXTRA_STEPS, RESULTS, STEPS, mean_interval, read_csv
from tqdm import tqdm


PAIRS_PER_STEP = 8
WARMUP_STEPS = 5
MAX_GRAD_NORM = 1.0
EVALUATED_STEPS = [8, 16, STEPS]
TUNING_SEEDS = [100, 101]
LEARNING_RATES, BETAS = [1e-5, 2e-5, 3e-5, 5e-5, 7e-5], [200.0, 2000.0]
GRID_SEEDS = list(range(10))
SEEDS = list(range(5))  # of other parts
PUBLISHED_SEEDS = [0, 1, 2]

EVERY = {"renoise_at": "every_move", "num_inversion_steps": 5}
ROWS = {
    "forward_hard": Row(noising="forward"),
    "ddim_hard": Row(noising="ddim"),
    "last_hard": Row(),
    "every_hard": Row(**EVERY),
    "last_soft": Row(labels="soft", gamma=10.0),
    "every_soft": Row(labels="soft", gamma=10.0, **EVERY),
    "forward_soft": Row(noising="forward", labels="soft", gamma=10.0),
    "released_hard": Row(noising="released", num_inversion_steps=5),
    "last_mixed_hard": Row(noising="renoise+mixed"),
    "every_mixed_hard": Row(noising="renoise+mixed", **EVERY),
    "last_mixed_soft": Row(noising="renoise+mixed", labels="soft", gamma=10.0),
}
REMEDIES = {  # forward noise where an inversion might need it, see `Bed.noised`
    "last_mixed": ROWS["last_mixed_hard"],
    "every_mixed": ROWS["every_mixed_hard"],
    "last_above": Row(noising="renoise+above"),
    "every_above": Row(noising="renoise+above", **EVERY),
    "every_below": Row(noising="renoise+below", **EVERY),
    "every_first": Row(noising="renoise+first", **EVERY),
}
PUBLISHED = {"learning_rate": 1e-5, "beta": 2000.0}  # for every row alike; the published rate is 1.024e-5
PUBLISHED_ROWS = ["forward_hard", "ddim_hard", "last_hard", "every_hard"]
OWN_ROWS = [*PUBLISHED_ROWS, "last_soft", "every_soft", "forward_soft", "released_hard"]
HYPER = {  # of "last_soft" as tuned, one value changed at a time
    "num_inversion_steps": [3, 5, 19],
    "guidance": [3.0, 5.0],
    "gamma": [1.0, 5.0, 20.0],
    "beta": [200.0, 2000.0],
}
LABELS = ["hard_flip10", "hard_flip30", "human"]  # of "last_hard" as tuned
LONG_ROWS, LONG, LONG_SEEDS = PUBLISHED_ROWS, {"learning_rate": 2e-5, "beta": 2000.0}, [0, 1]
LONG_PAIRS_PER_STEP, LONG_STEPS = 32, [8, 16, 32, 64, 120]

SCORES = ["reward", "judge", "accuracy", "vividness", "diversity", "distance"]
ROW_FIELDS = [field.name for field in dataclasses.fields(Row)]
RUN_FIELDS = ["part", "name", "pairs", "prompts", "seed", *ROW_FIELDS, "step", "unet_calls", "seconds", *SCORES]
KEY_FIELDS = ["part", "name", "pairs", "prompts", "seed", *ROW_FIELDS]

INVERSION_TIMESTEPS = [50, 300, 600, 999]
INVERSION_SEEDS, INVERSION_IMAGES, FINE_MOVES = [0, 1, 2], 16, 200
VARIANTS = {
    "DDIM, 3 moves": Row("ddim", num_inversion_steps=3),
    "DDIM, 5 moves": Row("ddim", num_inversion_steps=5),
    "DDIM, 9 moves": Row("ddim"),
    "DDIM, 18 moves": Row("ddim", num_inversion_steps=18),
    "9 moves, last corrected": Row(),
    "3 moves, every one corrected": Row(renoise_at="every_move", num_inversion_steps=3),
    "5 moves, every one corrected": Row(**EVERY),
    "9 moves, every one corrected": Row(renoise_at="every_move"),
    "9 moves, every one, mean of two": Row("mean"),
    "released code, 5 levels": Row("released", num_inversion_steps=5),
    "released code, 10 levels": Row("released", num_inversion_steps=10),
}
SIGNAL_ROWS = {
    "forward": ROWS["forward_hard"],
    "ddim": ROWS["ddim_hard"],
    "last": ROWS["last_hard"],
    "every": ROWS["every_hard"],
    "every_9": Row(renoise_at="every_move"),
    "released": ROWS["released_hard"],
}
SIGNAL_BINS, SIGNAL_BATCHES, SIGNAL_PAIRS = 4, 5, 16  # of timesteps; batches of a bin; pairs of a batch
REWARD_SEED, REWARD_IMAGES = 3000, 192
ASCENT_ROWS = {**SIGNAL_ROWS, **REMEDIES}
ASCENT_PAIRS = ["foreign", "own", "foreign: renders", "foreign: samples", "foreign: one of each"]
ASCENT_STEP, ASCENT_IMAGES = 3e-4, 4  # change of each weight; images of each of the tuning prompts
ASCENT_FIELDS = ["pairs", "noising", "labels", "gain", "error"]
SIGNAL_FIELDS = ["pairs", "noising", "bin", "labels", "cosine", "half", "norm", "residual", "std_tau"]
INVERSION_FIELDS = ["pairs", "variant", "t", "seed", "unet_calls", "std_tau", "distance", "round_trip", "residual"]


# Results


def append_csv(path, fields, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def key_of(row, fields):
    """What tells a result from others, as it stands in a CSV."""
    return tuple(f"{row[f]:.6g}" if isinstance(row[f], float) else str(row[f]) for f in fields)


# Training


def train(bed, row, pairs, seed, steps, evaluate_at, evaluate, pairs_per_step=PAIRS_PER_STEP):
    """Trains the base model as `row` says, and yields (step, UNet calls so far, seconds of training, scores)."""
    unet = bed.new_policy()
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=row.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / WARMUP_STEPS))
    labels = pairs.labels(row.labels, seed)
    order = order_of(len(pairs), steps * pairs_per_step, seed)
    unet_calls, seconds = 0, 0.0
    for step, chosen in enumerate(tqdm(order.split(pairs_per_step), desc="Steps", leave=False, mininterval=5), 1):
        started = time.perf_counter()
        loss, calls = bed.loss(row, unet, draw_batch(pairs, labels, chosen, seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        unet_calls += calls
        seconds += time.perf_counter() - started
        if step in evaluate_at:
            yield step, unet_calls, seconds, evaluate(unet)


class Lab:
    """The bed, its pairs and prompts, each made when first asked for, and the scores of the base model."""

    def __init__(self, results, backwards=False):
        self.results, self.backwards, self.kept = results, backwards, {}
        self.bed = Bed()

    def jobs(self, part, *lists):
        """All combinations of the lists' elements, with a progress bar."""
        found = list(itertools.product(*lists))
        return tqdm(found[::-1] if self.backwards else found, desc=part)

    def get(self, name, make):
        if name not in self.kept:
            with torch.no_grad():
                self.kept[name] = make()
        return self.kept[name]

    def pairs(self, name):
        make = {
            "foreign": self.bed.foreign_pairs,
            "own": self.bed.own_pairs,
            "own, as sampled": lambda: self.bed.own_pairs(encode=False),
            "foreign: renders": lambda: self.foreign_pairs_of(2),
            "foreign: samples": lambda: self.foreign_pairs_of(0),
            "foreign: one of each": lambda: self.foreign_pairs_of(1),
        }
        return self.get(f"{name} pairs", make[name])

    def foreign_pairs_of(self, num_renders):
        """Those of the foreign pairs in which so many images are renders; the others are an early checkpoint's samples."""
        pairs = self.pairs("foreign")
        return pairs[pairs.renders.view(2, -1).sum(0) == num_renders]

    def prompts(self, name):
        return self.get(name, {"report": self.bed.report_prompts, "tuning": self.bed.tuning_prompts}[name])

    def base(self, prompts, seed):
        return self.get((prompts, seed), lambda: self.bed.evaluate(self.bed.unet, self.prompts(prompts), seed))

    def run(self, part, name, row, seed, pairs="foreign", prompts="report", steps=STEPS, evaluate_at=None, **options):
        """One training run, appended to `runs.csv` as a whole, unless it is there."""
        path = self.results / "runs.csv"
        about = {"part": part, "name": name, "pairs": pairs, "prompts": prompts, "seed": seed, **vars(row)}
        known = {key_of(known, KEY_FIELDS) for known in read_csv(path)}
        base_scores, base_pictures = self.base(prompts, seed)
        base = {
            "part": "base",
            "name": "base",
            "pairs": "",
            "prompts": prompts,
            "seed": seed,
            **dict.fromkeys(ROW_FIELDS, ""),
        }
        if key_of(base, KEY_FIELDS) not in known:
            append_csv(path, RUN_FIELDS, [{**base, "step": 0, **base_scores}])
        if key_of(about, KEY_FIELDS) in known:
            return

        def evaluate(unet):
            return self.bed.evaluate(unet, self.prompts(prompts), seed, base_pictures)[0]

        rows = [
            {**about, "step": step, "unet_calls": calls, "seconds": seconds, **scores}
            for step, calls, seconds, scores in train(
                self.bed, row, self.pairs(pairs), seed, steps, evaluate_at or [steps], evaluate, **options
            )
        ]
        append_csv(path, RUN_FIELDS, rows)

    def tuned(self, name):
        """`ROWS[name]` with the learning rate and beta that were best at tuning, by the labelling model's reward."""
        rewards = {}
        for run in read_csv(self.results / "runs.csv"):
            if run["part"] == "tune" and run["name"] == name:
                setting = float(run["learning_rate"]), float(run["beta"])
                rewards.setdefault(setting, {})[run["seed"]] = float(run["reward"])
        num_seeds = len(TUNING_SEEDS)
        means = {
            setting: sum(found.values()) / num_seeds for setting, found in rewards.items() if len(found) == num_seeds
        }
        if len(means) < len(LEARNING_RATES) * len(BETAS):
            raise SystemExit(f"{name} is not tuned yet: run_ablation.py tune comes first.")
        learning_rate, beta = max(means, key=means.get)
        return dataclasses.replace(ROWS[name], learning_rate=learning_rate, beta=beta)


# Parts


def tune(lab):
    for seed, name, learning_rate, beta in lab.jobs("tune", TUNING_SEEDS, ROWS, LEARNING_RATES, BETAS):
        row = dataclasses.replace(ROWS[name], learning_rate=learning_rate, beta=beta)
        lab.run("tune", name, row, seed, prompts="tuning", steps=STEPS)


def grid(lab):
    for seed, name in lab.jobs("grid", GRID_SEEDS, ROWS):
        row = lab.tuned(name)
        steps = EXTRA_STEPS if row.noising == "forward" else STEPS
        lab.run("grid", name, row, seed, steps=steps, evaluate_at=[*EVALUATED_STEPS, steps])


def published(lab):
    for seed, name in lab.jobs("published", PUBLISHED_SEEDS, PUBLISHED_ROWS):
        lab.run("published", name, dataclasses.replace(ROWS[name], **PUBLISHED), seed, evaluate_at=[16, STEPS])


def own(lab):
    for seed, name in lab.jobs("own", SEEDS, OWN_ROWS):
        lab.run("own", name, lab.tuned(name), seed, pairs="own", evaluate_at=[16, STEPS])


def hyper(lab):
    values = [(field, value) for field, values in HYPER.items() for value in values]
    for seed, (field, value) in lab.jobs("hyper", SEEDS, values):
        row = lab.tuned("last_soft")
        if getattr(row, field) != value:
            lab.run("hyper", f"{field} {value:g}", dataclasses.replace(row, **{field: value}), seed)


def labels(lab):
    for seed, kind in lab.jobs("labels", SEEDS, LABELS):
        lab.run("labels", kind, dataclasses.replace(lab.tuned("last_hard"), labels=kind), seed)


def long(lab):
    """Four times the pairs a step and nearly four times the steps, at one learning rate and beta."""
    for seed, name in lab.jobs("long", LONG_SEEDS, LONG_ROWS):
        options = {"steps": LONG_STEPS[-1], "evaluate_at": LONG_STEPS, "pairs_per_step": LONG_PAIRS_PER_STEP}
        lab.run("long", name, dataclasses.replace(ROWS[name], **LONG), seed, **options)


@torch.no_grad()
def inversion(lab):
    """How good each inversion is: std(tau), RMS distance of tau to a fine inversion, round trip, residual."""
    path, bed = lab.results / "inversion.csv", lab.bed
    known = {key_of(row, ["pairs", "t", "seed"]) for row in read_csv(path)}
    sources = ["foreign", "own, as sampled"]
    for source, seed, timestep in lab.jobs("inversion", sources, INVERSION_SEEDS, INVERSION_TIMESTEPS):
        if (source, str(timestep), str(seed)) in known:
            continue
        pairs = lab.pairs(source)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randperm(len(pairs.mean), generator=generator)[:INVERSION_IMAGES]
        x_0 = pairs.mean[images]
        x_0 = x_0 + pairs.std[images] * torch.randn(x_0.shape, generator=generator)
        states = pairs.states[images % len(pairs)]
        t = torch.full((len(x_0),), timestep)

        def calls_and_tau(row):
            calls = 0

            def predict(x, timesteps, rows):
                nonlocal calls
                calls += 1
                return smpo.predict_noise(bed.unet, x, timesteps, {"encoder_hidden_states": states[rows]})

            if row.noising == "mean":
                levels = smpo.inversion_timesteps(t, row.num_inversion_steps, len(bed.alpha_bar))
                x_t = climb(predict, x_0, levels, bed.alpha_bar, "mean")
            else:
                x_t, calls = bed.noised(row, bed.unet, x_0, states, t, None)
                calls //= len(x_0)
            return calls, x_t, smpo.implied_noise(x_0, x_t, bed.alpha_bar[t])

        fine = calls_and_tau(Row("ddim", num_inversion_steps=FINE_MOVES))
        about = {"pairs": source, "t": timestep, "seed": seed}
        rows = []
        for name, row in {f"DDIM, {FINE_MOVES} moves": None, **VARIANTS}.items():
            calls, x_t, tau = fine if row is None else calls_and_tau(row)
            num_steps = FINE_MOVES if row is None else row.num_inversion_steps
            back = bed.descend(bed.unet, x_t, states, num_steps, t)
            eps = smpo.predict_noise(bed.unet, x_t, t, {"encoder_hidden_states": states})
            rows.append(
                {
                    **about, "variant": name, "unet_calls": calls, "std_tau": tau.flatten(1).std(1).mean().item(),
                    "distance": rms(tau - fine[2]), "round_trip": rms(back - x_0), "residual": rms(eps - tau),
                }
            )  # fmt: skip
        append_csv(path, INVERSION_FIELDS, rows)


def reward_gradient_of_sample(bed, unet, generator):
    """Gradient with respect to the UNet of the reward of one sample for a new prompt, as one vector.

    It goes through the labelling model, the decoder and all moves of the sampler.
    """
    prompts = bed.prompts(random_scenes(1, generator))
    latents = bed.sample(unet, prompts, 1, generator, with_grad=True)
    return flat(torch.autograd.grad(bed.rewards(bed.decode(latents), prompts, 1).sum(), list(unet.parameters())))


def reward_gradients(bed):
    """Directions in which the rewards of the base model's samples rise, `[REWARD_IMAGES, parameters]`, each of length 1.

    Their lengths differ so much that a few would drown the others in a mean.
    """
    generator, unet = torch.Generator().manual_seed(REWARD_SEED), bed.new_policy()
    directions = []
    for _ in tqdm(range(REWARD_IMAGES), desc="reward gradients"):
        gradient = reward_gradient_of_sample(bed, unet, generator)
        directions.append(gradient / gradient.norm())
    return torch.stack(directions)


def signal(lab):
    """Where the preference pushes the base model, for each noising: its cosine with the directions of `reward_gradients`.

    The timesteps of bin b are drawn from that quarter of all; bin "all" is the sum over the bins. `cosine` is the mean over
    the samples of the reward, `half` half of its 95 % interval, `norm` the length of the pairs' gradient, `residual` the RMS
    of the prediction minus tau.
    """
    path, bed = lab.results / "signal.csv", lab.bed
    known = {key_of(row, ["pairs", "noising"]) for row in read_csv(path)}
    jobs = [job for job in itertools.product(["foreign", "own"], SIGNAL_ROWS) if job not in known]
    if not jobs:
        return
    rewards, unet = reward_gradients(bed), bed.new_policy()
    for source, name in tqdm(jobs, desc="signal"):
        pairs, row = lab.pairs(source), SIGNAL_ROWS[name]
        sums, measured = {}, {}
        order = order_of(len(pairs), SIGNAL_BATCHES * SIGNAL_PAIRS, REWARD_SEED).split(SIGNAL_PAIRS)
        for (k, chosen), b in itertools.product(enumerate(order), range(SIGNAL_BINS)):
            x_0, states, t, noise, _ = draw_batch(pairs, pairs.soft, chosen, REWARD_SEED, k)
            t = (b * len(bed.alpha_bar) + t) // SIGNAL_BINS
            kinds = {kind: pairs.labels(kind, 0)[chosen] for kind in ("hard", "soft")}
            gradients, values = preference_gradients(bed, row, unet, x_0, states, t, noise, kinds)
            measured.setdefault(b, []).append(values)
            for kind, gradient in gradients.items():
                for key in [(b, kind), ("all", kind)]:
                    sums[key] = sums.get(key, 0) + gradient
        rows = []
        for (b, kind), gradient in sums.items():
            mean, half = mean_interval(rewards @ (gradient / gradient.norm()))
            row = {"pairs": source, "noising": name, "bin": b, "labels": kind, "norm": gradient.norm().item()}
            for key in ("residual", "std_tau") if b != "all" else ():
                row[key] = sum(values[key] for values in measured[b]) / len(measured[b])
            rows.append({**row, "cosine": float(mean), "half": float(half)})
        append_csv(path, SIGNAL_FIELDS, rows)


def ascent(lab):
    """What a step along the gradient of each noising does to the reward: how much of a preference arrives.

    The step is Adam's first: every weight by `ASCENT_STEP` in the direction of its gradient's sign. The gain is half of the
    difference between a step forward and one back, for the same prompts and noise; its error that of the mean over images.
    """
    path, bed = lab.results / "ascent.csv", lab.bed
    known = {key_of(row, ["pairs", "noising", "labels"]) for row in read_csv(path)}
    prompts = bed.tuning_prompts()
    weights = torch.nn.utils.parameters_to_vector(bed.unet.parameters())

    def rewards(step):
        unet = bed.new_policy().requires_grad_(False)
        torch.nn.utils.vector_to_parameters(weights + step, unet.parameters())
        generator = torch.Generator().manual_seed(REWARD_SEED)
        images = bed.decode(bed.sample(unet, prompts, ASCENT_IMAGES, generator))
        return bed.rewards(images, prompts, ASCENT_IMAGES)

    def write(source, name, kind, direction):
        step = ASCENT_STEP * direction.sign()
        gains = (rewards(step) - rewards(-step)).flatten() / 2
        error = gains.std() / math.sqrt(len(gains))
        row = {"pairs": source, "noising": name, "labels": kind, "gain": gains.mean().item(), "error": error.item()}
        append_csv(path, ASCENT_FIELDS, [row])

    if ("", "random", "") not in known:
        write("", "random", "", torch.randn(weights.shape, generator=torch.Generator().manual_seed(REWARD_SEED)))
    for source, name in lab.jobs("ascent", ASCENT_PAIRS, ASCENT_ROWS):
        if {(source, name, "hard"), (source, name, "soft")} <= known:
            continue
        pairs, sums = lab.pairs(source), {"hard": 0, "soft": 0}
        order = order_of(len(pairs), SIGNAL_BATCHES * SIGNAL_PAIRS, REWARD_SEED).split(SIGNAL_PAIRS)
        for k, chosen in enumerate(order):
            x_0, states, t, noise, _ = draw_batch(pairs, pairs.soft, chosen, REWARD_SEED, k)
            kinds = {kind: pairs.labels(kind, 0)[chosen] for kind in sums}
            gradients, _ = preference_gradients(bed, ASCENT_ROWS[name], bed.new_policy(), x_0, states, t, noise, kinds)
            for kind, gradient in gradients.items():
                sums[kind] = sums[kind] + gradient
        for kind, direction in sums.items():
            if (source, name, kind) not in known:
                write(source, name, kind, direction)


def preference_gradients(bed, row, unet, x_0, states, t, noise, kinds):
    """Ascent directions of the preference for the base model `unet`, where the loss of a pair is linear in its error gap.

    Args:
        kinds: labels of each kind, `{kind: p_0 [B]}`.

    Returns:
        `{kind: gradient}` of -(2 p_0 - 1) (error of image 0 - error of image 1), mean over the pairs, as one vector; and a
        dict of the RMS of prediction minus tau and of std(tau).
    """
    with torch.no_grad():
        x_t = bed.noised(row, unet, x_0, states, t, noise)[0]
    tau = smpo.implied_noise(x_0, x_t, bed.alpha_bar[t])
    errors = (smpo.predict_noise(unet, x_t, t, {"encoder_hidden_states": states}) - tau).pow(2).mean((1, 2, 3))
    gap_0, gap_1 = errors.chunk(2)
    gradients = {}
    for kind, soft_label_0 in kinds.items():
        aim = -((2 * soft_label_0 - 1) * (gap_0 - gap_1)).mean()
        gradients[kind] = flat(torch.autograd.grad(aim, list(unet.parameters()), retain_graph=True))
    measured = {"residual": errors.detach().mean().sqrt().item(), "std_tau": tau.flatten(1).std(1).mean().item()}
    return gradients, measured


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def rms(x):
    return x.pow(2).mean().sqrt().item()


PARTS = {
    "inversion": inversion,
    "tune": tune,
    "grid": grid,
    "signal": signal,
    "ascent": ascent,
    "published": published,
    "own": own,
    "hyper": hyper,
    "labels": labels,
    "long": long,
}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS], help="What to run, in this order.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the CSVs.")
    parser.add_argument("--num_threads", type=int, default=1, help="Threads of PyTorch.")
    parser.add_argument("--backwards", action="store_true", help="Each part's runs in reverse order.")
    return parser.parse_args(input_args)


def main(args):
    logging.disable(logging.INFO)
    torch.set_num_threads(args.num_threads)
    lab = Lab(args.results, args.backwards)
    for part in list(PARTS) if "all" in args.parts else args.parts:
        PARTS[part](lab)


if __name__ == "__main__":
    main(parse_args())
