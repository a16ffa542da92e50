# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""The paper's ablation on a small model, where every row can be trained many times.

    python tests/ablation/run_ablation.py all      # or some of: inversion gradients errors calm tune
    python tests/ablation/make_tables.py           # its tables in README.md

A result that is in the CSV is not computed again, so a stopped run goes on where it was; processes share the work with
different --seeds. `calm` trains the rows, all at one rate, and those that `tune` has been through at their best too.
With `--scale gpu` it is all done with a larger base model, which is trained first (`--base_model`).
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import logging
import time
from collections import namedtuple
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from bed import Bed, BigBed, Row, chosen, draw_batch, order_of, partly_random, smpo, stacked
from make_tables import COMMON_RATE, RESULTS, RESULTS_GPU, best_by_tuning, read_runs
from tqdm import tqdm


MAX_GRAD_NORM, WARMUP_STEPS = 1.0, 3
NOISINGS = {
    "forward": Row("forward"),
    "ddim": Row("ddim"),
    "last": Row(),
    "every": Row(renoise_at="every_move", num_inversion_steps=5),
    "released": Row("released", num_inversion_steps=5),
    "overshoot": Row("ddim", overshoot=5),
    "quarter": Row(noise_share=0.25),
    "mixed": Row(noise_share=0.5),
    "three_quarters": Row(noise_share=0.75),
    "overshoot_mixed": Row("ddim", overshoot=5, noise_share=0.5),
}
ROWS = {f"{name}_hard": row for name, row in NOISINGS.items()}
ROWS |= {f"{name}_soft": dataclasses.replace(row, labels="soft", gamma=10.0) for name, row in NOISINGS.items()}
ROWS["by_reference_soft"] = dataclasses.replace(ROWS["last_soft"], inverted_by="reference")
SOFT_ROWS = ("last_soft", "released_soft", "forward_soft", "mixed_soft", "ddim_soft", "every_soft")
HARD_ROWS = tuple(name.replace("soft", "hard") for name in SOFT_ROWS)
BLOCKS = [  # what `calm` trains, the most important first
    ("foreign", SOFT_ROWS),
    ("own", SOFT_ROWS),
    ("foreign", ("by_reference_soft", "overshoot_soft", "quarter_soft")),
    ("foreign", HARD_ROWS),
    ("own", HARD_ROWS),
]


Settings = namedtuple("Settings", ["pairs_per_step", "evaluated", "seeds"])  # evaluated: after which steps
SCALES = {"cpu": Settings(96, (4, 8), tuple(range(10))), "gpu": Settings(256, (4, 8), tuple(range(3)))}
TUNE_SEEDS, LEARNING_RATES = (100, 101), (2e-5, 5e-5, 1e-4)

SCORES = ["reward", "judge", "accuracy", "diversity", "distance"]
RUN_KEY = ["part", "name", "pairs", "seed", "pairs_per_step", *(field.name for field in dataclasses.fields(Row))]
RUN_COLUMNS = [*RUN_KEY, "prompts", "step", "unet_calls", *SCORES]

INVERSION_TIMESTEPS, INVERSION_SEEDS, INVERSION_IMAGES = [50, 300, 600, 999], [0, 1, 2], 16
VARIANTS = {
    **{f"DDIM, {n} moves": Row("ddim", num_inversion_steps=n) for n in (200, 3, 5, 9, 18)},  # all against the first
    "9 moves, last corrected": Row(),
    **{f"{n} moves, every one corrected": Row(renoise_at="every_move", num_inversion_steps=n) for n in (3, 5, 9)},
    **{f"released code, {n} levels": Row("released", num_inversion_steps=n) for n in (5, 10)},
    "forward noise": Row("forward"),
}
ERROR_ROWS, ERROR_PAIRS = ("last_soft", "by_reference_soft", "released_soft", "mixed_soft", "forward_soft"), 192
GRADIENT_SEED, GRADIENT_SETS, GRADIENT_PAIRS = 3000, 10, 24  # disjoint sets, pairs of each


def append(path, rows, columns=None):
    """Adds rows, dicts, to a CSV."""
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.6g")


def is_known(path, row, key):
    """Whether a CSV has a row with this one's values of `key`."""
    if not path.exists():
        return False
    values = tuple(f"{row[name]:.6g}" if isinstance(row[name], float) else str(row[name]) for name in key)
    return values in set(pd.read_csv(path, dtype=str, keep_default_na=False)[key].itertuples(index=False, name=None))


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
                print(f"{part}: the time limit is reached; the same command goes on.")
                raise SystemExit
            yield job

    def record(self, path, about, prompts, evaluated, steps):
        """Scores a run, and the base, on `prompts`, and appends them to a CSV as a whole, unless they are there.

        `about` has a value for each of RUN_KEY, `evaluated` the steps to score after; `steps()` begins the run and
        yields (UNet, UNet calls so far) after every step.
        """
        seed = about["seed"]
        base = {**dict.fromkeys(RUN_COLUMNS, ""), "part": "base", "seed": seed, "prompts": prompts, "step": 0}
        if not is_known(path, base, [*RUN_KEY, "prompts"]):
            append(path, [base | self.base(prompts, seed)[0]], RUN_COLUMNS)
        if is_known(path, about, RUN_KEY):
            return
        rows = []
        for step, (unet, calls) in enumerate(steps(), 1):
            if step in evaluated:
                scores, _ = self.bed.evaluate(unet, self.prompts(prompts), seed, self.base(prompts, seed)[1])
                rows.append({**about, "prompts": prompts, "step": step, "unet_calls": calls, **scores})
        append(path, rows, RUN_COLUMNS)

    def run(self, part, name, seed, learning_rate, pairs, prompts):
        """One training run, into `runs.csv`."""
        row = dataclasses.replace(ROWS[name], learning_rate=learning_rate)
        pairs_per_step, evaluated, _ = self.settings
        about = {"part": part, "name": name, "pairs": pairs, "seed": seed, "pairs_per_step": pairs_per_step}
        about |= vars(row)
        self.record(
            self.results / "runs.csv", about, prompts, evaluated,
            lambda: train(self.bed, row, self.pairs(pairs), seed, pairs_per_step, evaluated[-1]),
        )  # fmt: skip


def train(bed, row, pairs, seed, pairs_per_step, num_steps, unet=None):
    """Trains `unet`, if None the base model, as `row` says, and yields (UNet, UNet calls so far) after every step."""
    unet, unet_calls = unet or bed.new_policy(), 0
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=row.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / WARMUP_STEPS))
    order = order_of(len(pairs.soft), num_steps * pairs_per_step, seed).split(pairs_per_step)
    for step, rows in enumerate(order, 1):
        loss, calls = bed.loss(row, unet, draw_batch(chosen(pairs, rows), row.labels, seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        unet_calls += calls
        yield unet, unet_calls


def calm(lab):
    """The rows on pairs of other sources and on the base model's own samples, none of which is seen twice."""
    for pairs, names in BLOCKS:
        for seed, name in lab.jobs(f"calm, {pairs}", lab.settings.seeds, names):
            for rate in sorted({COMMON_RATE, tuned_rate(lab, name, pairs)}):
                lab.run("calm", name, seed, rate, pairs, "report")


def tune(lab):
    """Other rates, with seeds and prompts of their own."""
    for pairs, names in BLOCKS:
        for seed, name, rate in lab.jobs(f"tune, {pairs}", TUNE_SEEDS, names, LEARNING_RATES):
            lab.run("tune", name, seed, rate, pairs, "tuning")


def tuned_rate(lab, name, pairs):
    """The rate with the best mean reward at its best step, or the common one where `tune` has not been through."""
    if not (path := lab.results / "runs.csv").exists():
        return COMMON_RATE
    runs = read_runs(path)
    runs = runs[(runs["part"] == "tune") & (runs["name"] == name) & (runs["pairs"] == pairs)]
    is_whole = len(runs) == len(TUNE_SEEDS) * len(LEARNING_RATES) * len(lab.settings.evaluated)
    return best_by_tuning(runs)["learning_rate"].item() if is_whole else COMMON_RATE


@torch.no_grad()
def inversion(lab):
    """How good each inversion is: std(tau), RMS of tau's distance to a fine one, of the round trip, of eps - tau."""
    path, bed = lab.results / "inversion.csv", lab.bed
    for seed, timestep in lab.jobs("inversion", INVERSION_SEEDS, INVERSION_TIMESTEPS):
        if is_known(path, {"seed": seed, "t": timestep}, ["seed", "t"]):
            continue
        pairs, generator = lab.pairs("stored"), torch.Generator().manual_seed(seed)
        images = torch.randperm(2 * len(pairs.soft), generator=generator)[:INVERSION_IMAGES]
        mean, std = stacked(pairs.mean)[images], stacked(pairs.std)[images]
        x_0 = mean + std * torch.randn(mean.shape, generator=generator).to(bed.device)
        noise = torch.randn(x_0.shape, generator=generator).to(bed.device)
        states, t = pairs.states[images % len(pairs.soft)], torch.full((len(x_0),), timestep)
        rows, fine_tau = [], None
        for variant, row in VARIANTS.items():
            x_t, calls = bed.noised(row, bed.unet, x_0, states, t, noise)
            tau = smpo.implied_noise(x_0, x_t, bed.alpha_bar[t])
            fine_tau = tau if fine_tau is None else fine_tau
            back = bed.descend(bed.unet, x_t, states, row.num_inversion_steps, t)
            eps = smpo.call_unet(bed.unet, x_t, t.to(bed.device), {"encoder_hidden_states": states})
            about = {"variant": variant, "t": timestep, "seed": seed, "unet_calls": calls // len(x_0)}
            numbers = {"distance": rms(tau - fine_tau), "round_trip": rms(back - x_0), "residual": rms(eps - tau)}
            rows.append({**about, "std_tau": mean_std(tau), **numbers})
        append(path, rows)


def gradients(lab):
    """What there is of a preference in the gradient of each noising, by quarter of t, for disjoint sets of pairs.

    `size` is the RMS over weights of a set's gradient; `agreement` its mean cosine with those of the other sets;
    `forward` the mean cosine of it with the other sets' for forward noise, and of theirs with its own for forward
    noise.
    """
    path, bed = lab.results / "gradients.csv", lab.bed
    for _, quarter in lab.jobs("gradients", [GRADIENT_SEED], range(4)):
        if is_known(path, {"quarter": quarter}, ["quarter"]):
            continue
        pairs, unet = lab.pairs("foreign"), bed.new_policy()
        order = order_of(len(pairs.soft), GRADIENT_SETS * GRADIENT_PAIRS, GRADIENT_SEED).split(GRADIENT_PAIRS)
        rows, directions = ({name: [] for name in NOISINGS} for _ in range(2))
        for number, some in enumerate(order):
            x_0, states, t, noise, p_0 = draw_batch(chosen(pairs, some), "soft", GRADIENT_SEED, number)
            t, inverted = (len(bed.alpha_bar) * quarter + t) // 4, {}
            for name, row in NOISINGS.items():
                plain = dataclasses.replace(row, noise_share=0.0)
                if plain not in inverted:
                    x_t, _ = bed.noised(plain, unet, x_0, states, t, noise)
                    inverted[plain] = smpo.implied_noise(x_0, x_t, bed.alpha_bar[t])
                tau = partly_random(inverted[plain], noise, row.noise_share)
                gradient, residual = preference_gradient(bed, unet, (x_0, states, t, tau, p_0))
                directions[name].append(F.normalize(gradient, dim=0))
                about = {"quarter": quarter, "noising": name, "set": number, "size": rms(gradient)}
                rows[name].append({**about, "std_tau": mean_std(tau), "residual": rms(residual)})
        forward = torch.stack(directions["forward"])
        for name in NOISINGS:
            own = torch.stack(directions.pop(name))
            for column, others in {"agreement": own, "forward": forward}.items():
                cosines = own @ others.T
                cosines = ((cosines + cosines.T) / 2).fill_diagonal_(0).sum(1) / (len(order) - 1)
                rows[name] = [{**row, column: cosine.item()} for row, cosine in zip(rows[name], cosines)]
        append(path, itertools.chain(*rows.values()))


def preference_gradient(bed, unet, batch):
    """Where the preferences of a batch push the base model `unet`, as one vector; and the residual eps - tau.

    It is the gradient of -(2 p_0 - 1) (error of image 0 - error of image 1), mean over the pairs, in which the loss is
    linear where policy and reference are the same.
    """
    x_0, states, t, tau, p_0 = batch
    x_t = smpo.add_noise(x_0, tau, bed.alpha_bar[t])
    eps = smpo.call_unet(unet, x_t, t.to(bed.device), {"encoder_hidden_states": states})
    error_0, error_1 = smpo.squared_errors(eps, tau).chunk(2)
    aim = -((2 * p_0 - 1) * (error_0 - error_1)).mean()
    return flat(torch.autograd.grad(aim, list(unet.parameters()))), (eps - tau).detach()


@torch.no_grad()
def errors(lab):
    """How much more than the reference a trained policy errs on preferred and on rejected images of unseen pairs."""
    path, (pairs_per_step, evaluated, seeds) = lab.results / "errors.csv", lab.settings
    for seed, name in lab.jobs("errors", seeds[:3], ERROR_ROWS):
        about, rows, num_trained = {"name": name, "seed": seed}, [], evaluated[-1] * pairs_per_step
        if is_known(path, about, list(about)):
            continue
        row, pairs = ROWS[name], lab.pairs("foreign")
        unseen = order_of(len(pairs.soft), num_trained + ERROR_PAIRS, seed)[num_trained:]
        batch = draw_batch(chosen(pairs, unseen), row.labels, seed, 0)
        prefers_0 = batch[-1] > 0.5
        with torch.enable_grad():
            steps = enumerate(train(lab.bed, row, pairs, seed, pairs_per_step, evaluated[-1]), 1)
            policies = {step: copy.deepcopy(unet) for step, (unet, _) in steps if step in evaluated}
        for step, policy in policies.items():
            model_errors, ref_errors, _ = lab.bed.errors(row, policy, batch)
            gap_0, gap_1 = ((model_errors - ref_errors) / ref_errors.mean()).chunk(2)
            preferred, rejected = torch.where(prefers_0, gap_0, gap_1), torch.where(prefers_0, gap_1, gap_0)
            gaps = {"preferred": preferred.mean().item(), "rejected": rejected.mean().item()}
            rows.append({**about, "step": step, **gaps, "accuracy": (preferred < rejected).double().mean().item()})
        append(path, rows)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def rms(x):
    return x.pow(2).mean().sqrt().item()


def mean_std(images):
    """Standard deviation within an image, mean over them."""
    return images.flatten(1).std(1).mean().item()


PARTS = {part.__name__: part for part in (inversion, gradients, errors, calm, tune)}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS], help="What to run, in this order.")
    parser.add_argument("--scale", choices=list(SCALES), default="cpu", help="The tiny model, or one for a GPU.")
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
