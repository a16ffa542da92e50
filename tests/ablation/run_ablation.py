# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""The paper's ablation on a small model, where every row can be trained many times.

    python tests/ablation/run_ablation.py all      # or some of: inversion gradients calm tune
    python tests/ablation/make_tables.py           # its tables in README.md

A result that is in the CSV is not computed again, so a stopped run goes on where it was; processes share the work with
different --seeds. `calm` trains the rows, all at one rate, and those that `tune` has been through at their best too.
With `--scale gpu` it is all done with a larger base model, which is trained first (`--base_model`).
"""

import argparse
import dataclasses
import functools
import itertools
import logging
import time
from pathlib import Path

import pandas as pd
import torch
from bed import Bed, BigBed, Row, draw_batch, order_of, smpo
from make_tables import RESULTS, RESULTS_GPU
from tqdm import tqdm


MAX_GRAD_NORM, WARMUP_STEPS = 1.0, 3
EVERY = {"renoise_at": "every_move", "num_inversion_steps": 5}
NOISINGS = {
    "forward": Row("forward"),
    "ddim": Row("ddim"),
    "last": Row(),
    "every": Row(**EVERY),
    "released": Row("released", num_inversion_steps=5),
    "mixed": Row(noise_share=0.5),
    "overshoot": Row("ddim", overshoot=5),
    "quarter": Row(noise_share=0.25),
}
ROWS = {f"{name}_hard": row for name, row in NOISINGS.items()}
ROWS |= {f"{name}_soft": dataclasses.replace(row, labels="soft", gamma=10.0) for name, row in NOISINGS.items()}
MAIN_ROWS = ("last_soft", "released_soft", "forward_soft", "mixed_soft", "ddim_soft", "every_soft")
BLOCKS = [  # what `calm` trains, the most important first
    ("foreign", MAIN_ROWS),
    ("own", MAIN_ROWS),
    ("foreign", ("overshoot_soft", "quarter_soft")),
    ("foreign", tuple(name.replace("soft", "hard") for name in MAIN_ROWS)),
    ("own", tuple(name.replace("soft", "hard") for name in MAIN_ROWS)),
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a scale trains with: pairs of a step, steps after which it is scored, seeds."""

    pairs_per_step: int
    evaluated: tuple
    seeds: tuple


SCALES = {"cpu": Settings(96, (4, 8), tuple(range(5))), "gpu": Settings(256, (4, 8), tuple(range(3)))}
TUNE_SEEDS, LEARNING_RATES = (100, 101), (2e-5, 5e-5, 1e-4)

SCORES = ["reward", "judge", "accuracy", "diversity", "distance"]
RUN_KEY = ["part", "name", "pairs", "seed", "pairs_per_step", *(field.name for field in dataclasses.fields(Row))]
RUN_COLUMNS = [*RUN_KEY, "prompts", "step", "unet_calls", *SCORES]

INVERSION_TIMESTEPS, INVERSION_SEEDS = [50, 300, 600, 999], [0, 1, 2]
INVERSION_IMAGES, FINE_MOVES = 16, 200
VARIANTS = {
    "DDIM, 200 moves": Row("ddim", num_inversion_steps=FINE_MOVES),  # what the others are compared with
    **{f"DDIM, {n} moves": Row("ddim", num_inversion_steps=n) for n in (3, 5, 9, 18)},
    "9 moves, last corrected": Row(),
    **{f"{n} moves, every one corrected": Row(renoise_at="every_move", num_inversion_steps=n) for n in (3, 5, 9)},
    **{f"released code, {n} levels": Row("released", num_inversion_steps=n) for n in (5, 10)},
    "forward noise": Row("forward"),
}
GRADIENT_SEED, GRADIENT_PAIRS = 3000, 32  # pairs of each of two sets


# Results


def append(path, rows, columns=None):
    """Adds rows, dicts, to a CSV."""
    pd.DataFrame(rows, columns=columns).to_csv(
        path, mode="a", header=not path.exists(), index=False, float_format="%.6g"
    )


def known(path, key):
    """The keys of what is in a CSV, as `key_of` has them."""
    if not path.exists():
        return set()
    return set(pd.read_csv(path, dtype=str, keep_default_na=False)[key].itertuples(index=False, name=None))


def key_of(row, key):
    return tuple(f"{row[name]:.6g}" if isinstance(row[name], float) else str(row[name]) for name in key)


# Training


def train(bed, row, pairs, seed, pairs_per_step, steps):
    """Trains the base model as `row` says, and yields (UNet, UNet calls so far) after every step."""
    unet, unet_calls = bed.new_policy(), 0
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=row.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / WARMUP_STEPS))
    order = order_of(len(pairs), steps * pairs_per_step, seed).split(pairs_per_step)
    for step, chosen in enumerate(order, 1):
        loss, calls = bed.loss(row, unet, draw_batch(pairs, pairs.labels(row.labels), chosen, seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        unet_calls += calls
        yield unet, unet_calls


class Lab:
    """The bed, its pairs, prompts and base scores, each made when first asked for, and where results go."""

    def __init__(self, results, settings, bed, seeds=None, end=None):
        self.results, self.settings, self.bed, self.seeds, self.end = results, settings, bed, seeds, end

    @functools.cache
    def pairs(self, name):
        return getattr(self.bed, f"{name}_pairs")()

    @functools.cache
    def prompts(self, name):
        return getattr(self.bed, f"{name}_prompts")()

    @functools.cache
    def base(self, prompts, seed):
        return self.bed.evaluate(self.bed.unet, self.prompts(prompts), seed)

    def jobs(self, part, seeds, *lists):
        """All combinations of the wanted seeds and the lists' elements, until the time is over."""
        wanted = [seed for seed in seeds if self.seeds is None or seed in self.seeds]
        for job in tqdm(list(itertools.product(wanted, *lists)), desc=part):
            if self.end and time.monotonic() > self.end:
                raise SystemExit(f"{part}: the time limit is reached; the same command goes on.")
            yield job

    def run(self, part, name, seed, learning_rate, pairs, prompts):
        """One training run, appended to `runs.csv` as a whole, unless it is there; and the base's scores."""
        path, settings = self.results / "runs.csv", self.settings
        row = dataclasses.replace(ROWS[name], learning_rate=learning_rate)
        about = {"part": part, "name": name, "pairs": pairs, "seed": seed, "pairs_per_step": settings.pairs_per_step}
        about |= vars(row)
        base = {**dict.fromkeys(RUN_COLUMNS, ""), "part": "base", "seed": seed, "prompts": prompts, "step": 0}
        if key_of(base, [*RUN_KEY, "prompts"]) not in known(path, [*RUN_KEY, "prompts"]):
            append(path, [base | self.base(prompts, seed)[0]], RUN_COLUMNS)
        if key_of(about, RUN_KEY) in known(path, RUN_KEY):
            return
        rows, evaluated = [], settings.evaluated
        steps = train(self.bed, row, self.pairs(pairs), seed, settings.pairs_per_step, evaluated[-1])
        for step, (unet, calls) in enumerate(steps, 1):
            if step in evaluated:
                scores, _ = self.bed.evaluate(unet, self.prompts(prompts), seed, self.base(prompts, seed)[1])
                rows.append({**about, "prompts": prompts, "step": step, "unet_calls": calls, **scores})
        append(path, rows, RUN_COLUMNS)


# Parts


def calm(lab):
    """The rows on pairs of other sources and on the base model's own samples, none of which is seen twice."""
    for pairs, names in BLOCKS:
        for seed, name in lab.jobs(f"calm, {pairs}", lab.settings.seeds, names):
            for rate in sorted({Row().learning_rate, tuned_rate(lab.results, name, pairs)}):
                lab.run("calm", name, seed, rate, pairs, "report")


def tune(lab):
    """Other rates, with seeds and prompts of their own."""
    for pairs, names in BLOCKS:
        for seed, name, rate in lab.jobs(f"tune, {pairs}", TUNE_SEEDS, names, LEARNING_RATES):
            lab.run("tune", name, seed, rate, pairs, "tuning")


def tuned_rate(results, name, pairs):
    """The rate with the best mean reward at its best step, or the common one where `tune` has not been through."""
    if not (results / "runs.csv").exists():
        return Row().learning_rate
    runs = pd.read_csv(results / "runs.csv")
    runs = runs[(runs["part"] == "tune") & (runs["name"] == name) & (runs["pairs"] == pairs)]
    rewards = runs.pivot_table(index=["learning_rate", "step"], columns="seed", values="reward")
    rewards = rewards.reindex(columns=TUNE_SEEDS).dropna().mean(axis=1)
    complete = len(rewards.index.unique("learning_rate")) == len(LEARNING_RATES) if len(rewards) else False
    return rewards.idxmax()[0] if complete else Row().learning_rate


@torch.no_grad()
def inversion(lab):
    """How good each inversion is: std(tau), RMS of tau's distance to a fine one, of the round trip, of eps - tau."""
    path, bed = lab.results / "inversion.csv", lab.bed
    for seed, timestep in lab.jobs("inversion", INVERSION_SEEDS, INVERSION_TIMESTEPS):
        if (str(seed), str(timestep)) in known(path, ["seed", "t"]):
            continue
        pairs, generator = lab.pairs("stored"), torch.Generator().manual_seed(seed)
        images = torch.randperm(len(pairs.mean), generator=generator)[:INVERSION_IMAGES]
        x_0 = pairs.mean[images]
        x_0 = x_0 + pairs.std[images] * torch.randn(x_0.shape, generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        states, t = pairs.states[images % len(pairs)], torch.full((len(x_0),), timestep)
        rows, fine_tau = [], None
        for variant, row in VARIANTS.items():
            x_t, calls = bed.noised(row, bed.unet, x_0, states, t, noise)
            tau = smpo.implied_noise(x_0, x_t, bed.alpha_bar[t])
            fine_tau = tau if fine_tau is None else fine_tau
            back = bed.descend(bed.unet, x_t, states, row.num_inversion_steps, t)
            eps = smpo.call_unet(bed.unet, x_t, t, {"encoder_hidden_states": states})
            differences = {"distance": tau - fine_tau, "round_trip": back - x_0, "residual": eps - tau}
            numbers = {name: x.pow(2).mean().sqrt().item() for name, x in differences.items()}
            about = {"variant": variant, "t": timestep, "seed": seed, "unet_calls": calls // len(x_0)}
            rows.append({**about, "std_tau": tau.flatten(1).std(1).mean().item(), **numbers})
        append(path, rows)


def gradients(lab):
    """Size and direction of the gradient of each noising, by quarter of t: what there is of a preference, and where.

    `size` is the RMS over weights of the gradient over two sets of pairs, `agreement` the cosine between that of one
    set and that of the other, `forward` its cosine with the gradient of random noise on the same pairs.
    """
    path, bed = lab.results / "gradients.csv", lab.bed
    for _, quarter in lab.jobs("gradients", [GRADIENT_SEED], range(4)):
        if (str(quarter),) in known(path, ["quarter"]):
            continue
        pairs, unet, found = lab.pairs("foreign"), bed.new_policy(), {}
        order = order_of(len(pairs), 2 * GRADIENT_PAIRS, GRADIENT_SEED).split(GRADIENT_PAIRS)
        for half, chosen in enumerate(order):
            x_0, states, t, *rest = draw_batch(pairs, pairs.soft, chosen, GRADIENT_SEED, half)
            batch = x_0, states, (len(bed.alpha_bar) * quarter + t) // 4, *rest
            for name, row in NOISINGS.items():
                found[name, half] = preference_gradient(bed, row, unet, batch).double()
        rows = []
        for name in NOISINGS:
            whole = {key: (found[key, 0] + found[key, 1]) / 2 for key in (name, "forward")}
            numbers = {
                "size": whole[name].pow(2).mean().sqrt(),
                "agreement": torch.cosine_similarity(found[name, 0], found[name, 1], dim=0),
                "forward": torch.cosine_similarity(whole[name], whole["forward"], dim=0),
            }
            rows.append({"quarter": quarter, "noising": name} | {key: x.item() for key, x in numbers.items()})
        append(path, rows)


def preference_gradients(bed, row, unet, batch):
    """Where the preferences of a batch push the base model `unet`, as one vector for each kind of labels.

    It is the gradient of -(2 p_0 - 1) (error of image 0 - error of image 1), mean over the pairs, in which the loss is
    linear where policy and reference are the same.
    """
    model_errors, _, _ = bed.errors(row, unet, batch)
    gap_0, gap_1 = model_errors.chunk(2)
    gradients = {}
    for kind, soft_label_0 in {"hard": batch[-1] > 0.5, "soft": batch[-1]}.items():
        aim = -((2.0 * soft_label_0 - 1) * (gap_0 - gap_1)).mean()
        gradients[kind] = flat(torch.autograd.grad(aim, list(unet.parameters()), retain_graph=True))
    return gradients


def preference_gradient(bed, row, unet, batch):
    """Where the preferences of a batch push the base model `unet`, as one vector.

    It is the gradient of -(2 p_0 - 1) (error of image 0 - error of image 1), mean over the pairs, in which the loss is
    linear where policy and reference are the same.
    """
    error_0, error_1 = bed.errors(row, unet, batch)[0].chunk(2)
    aim = -((2 * batch[-1] - 1) * (error_0 - error_1)).mean()
    return flat(torch.autograd.grad(aim, list(unet.parameters())))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


PARTS = {part.__name__: part for part in (inversion, gradients, calm, tune)}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS], help="What to run, in this order.")
    parser.add_argument(
        "--scale", choices=list(SCALES), default="cpu", help="The tiny model, or a larger one on a GPU."
    )
    parser.add_argument("--base_model", type=Path, default=Path("ablation_base.pt"), help="Of --scale gpu: its file.")
    parser.add_argument("--results", type=Path, help="Folder of the CSVs; results or results_gpu beside this file.")
    parser.add_argument("--seeds", nargs="+", type=int, help="Only these of a part's seeds.")
    parser.add_argument("--time_limit", type=float, help="Seconds after which nothing new is begun.")
    return parser.parse_args(input_args)


def main(args):
    logging.disable(logging.INFO)
    end = time.monotonic() + args.time_limit if args.time_limit else None
    results = args.results or (RESULTS if args.scale == "cpu" else RESULTS_GPU)
    results.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bed = Bed() if args.scale == "cpu" else BigBed(device, args.base_model, end)
    lab = Lab(results, SCALES[args.scale], bed, args.seeds, end)
    for part in list(PARTS) if "all" in args.parts else args.parts:
        PARTS[part](lab)


if __name__ == "__main__":
    main(parse_args())
