# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""The paper's ablation on the tiny model, where every row can be trained many times on a CPU.

    python tests/ablation/run_ablation.py all      # or some of: inversion ascent tune grid calm
    python tests/ablation/make_tables.py           # its tables in README.md

A result that is in the CSV is not computed again, so a stopped run goes on where it was; processes share the work with
different --seeds. `tune` chooses learning rate and beta of every row of `grid` by the mean of some seeds, on prompts
that are not reported. `calm`, with many pairs a step, evaluates each of its learning rates on both sets of prompts.
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
from bed import Bed, Row, draw_batch, order_of, smpo
from make_tables import RESULTS
from tqdm import tqdm


MAX_GRAD_NORM = 1.0
EVERY = {"renoise_at": "every_move", "num_inversion_steps": 5}
NOISINGS = {
    "forward": Row("forward"),
    "ddim": Row("ddim"),
    "last": Row(),
    "every": Row(**EVERY),
    "every_9": Row(renoise_at="every_move"),
    "released": Row("released", num_inversion_steps=5),
    "last_mixed": Row(noise_share=0.5),
    "every_mixed": Row(noise_share=0.5, **EVERY),
}
ROWS = {f"{name}_hard": row for name, row in NOISINGS.items()}
ROWS |= {f"{name}_soft": dataclasses.replace(row, labels="soft", gamma=10.0) for name, row in NOISINGS.items()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, how often, how long, and at which rates."""

    rows: tuple
    seeds: tuple
    evaluated: tuple  # steps; the last one ends a run
    pairs_per_step: int = 8
    warmup_steps: int = 5
    learning_rates: tuple = ()
    betas: tuple = ()


GRID_ROWS = (
    "forward_hard", "ddim_hard", "last_hard", "every_hard", "last_soft", "every_soft", "forward_soft", "released_hard",
    "last_mixed_hard", "every_mixed_hard", "last_mixed_soft",
)  # fmt: skip
CALM_ROWS = tuple(name for name in ROWS if not name.startswith(("every_9", "every_mixed")))
TUNE = Settings(GRID_ROWS, (100, 101), (32,), 8, 5, (1e-5, 2e-5, 3e-5, 5e-5, 7e-5), (200.0, 2000.0))
GRID = {
    "foreign": Settings(GRID_ROWS, tuple(range(10)), (8, 16, 32)),
    "own": Settings(GRID_ROWS[:8], tuple(range(5)), (16, 32)),
}
FORWARD_STEPS = 80  # of forward noising on foreign pairs: the UNet calls of 32 steps with 10 an image, at 4 an image
CALM = Settings(CALM_ROWS, tuple(range(5)), (4, 8, 16), 96, 3, (2e-5, 5e-5, 1e-4), (200.0,))

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
ASCENT_SEED, ASCENT_BATCHES, ASCENT_PAIRS = 3000, 5, 16  # batches of a gradient; pairs of a batch
ASCENT_STEP, ASCENT_IMAGES = 3e-4, 4  # change of each weight; images of each of the tuning prompts


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


def train(bed, row, pairs, seed, settings, steps):
    """Trains the base model as `row` says, and yields (UNet, UNet calls so far) after every step."""
    unet, unet_calls = bed.new_policy(), 0
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=row.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / settings.warmup_steps))
    order = order_of(len(pairs), steps * settings.pairs_per_step, seed).split(settings.pairs_per_step)
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

    def __init__(self, results, seeds=None, time_limit=None):
        self.results, self.seeds, self.bed = results, seeds, Bed()
        self.end = time.monotonic() + time_limit if time_limit else None

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

    def run(self, part, name, row, seed, settings, pairs="foreign", prompts=("report",), evaluated=None):
        """One training run, appended to `runs.csv` as a whole, unless it is there; and the base's scores."""
        path, evaluated = self.results / "runs.csv", evaluated or settings.evaluated
        about = {"part": part, "name": name, "pairs": pairs, "seed": seed, "pairs_per_step": settings.pairs_per_step}
        about |= vars(row)
        for some in prompts:
            base = {**dict.fromkeys(RUN_COLUMNS, ""), "part": "base", "seed": seed, "prompts": some, "step": 0}
            if key_of(base, [*RUN_KEY, "prompts"]) not in known(path, [*RUN_KEY, "prompts"]):
                append(path, [base | self.base(some, seed)[0]], RUN_COLUMNS)
        if key_of(about, RUN_KEY) in known(path, RUN_KEY):
            return
        rows = []
        steps = train(self.bed, row, self.pairs(pairs), seed, settings, evaluated[-1])
        for step, (unet, calls) in enumerate(steps, 1):
            for some in prompts if step in evaluated else ():
                scores, _ = self.bed.evaluate(unet, self.prompts(some), seed, self.base(some, seed)[1])
                rows.append({**about, "prompts": some, "step": step, "unet_calls": calls, **scores})
        append(path, rows, RUN_COLUMNS)

    def tuned(self, name):
        """`ROWS[name]` with the learning rate and beta that were best at tuning, by the labelling model's reward."""
        runs = pd.read_csv(self.results / "runs.csv")
        runs = runs[(runs["part"] == "tune") & (runs["name"] == name)]
        rewards = runs.pivot_table(index=["learning_rate", "beta"], columns="seed", values="reward")
        rewards = rewards.reindex(columns=TUNE.seeds).dropna()
        if len(rewards) < len(TUNE.learning_rates) * len(TUNE.betas):
            raise SystemExit(f"{name} is not tuned yet: run_ablation.py tune comes first.")
        learning_rate, beta = rewards.mean(axis=1).idxmax()
        return dataclasses.replace(ROWS[name], learning_rate=learning_rate, beta=beta)


# Parts


def tune(lab):
    for seed, name, learning_rate, beta in lab.jobs("tune", TUNE.seeds, TUNE.rows, TUNE.learning_rates, TUNE.betas):
        row = dataclasses.replace(ROWS[name], learning_rate=learning_rate, beta=beta)
        lab.run("tune", name, row, seed, TUNE, prompts=["tuning"])


def grid(lab):
    """Every row as tuned, on pairs of other sources and on the base model's own samples."""
    for pairs, settings in GRID.items():
        for seed, name in lab.jobs(f"grid, {pairs}", settings.seeds, settings.rows):
            longer = pairs == "foreign" and name.startswith("forward")
            evaluated = [*settings.evaluated, FORWARD_STEPS] if longer else None
            lab.run("grid", name, lab.tuned(name), seed, settings, pairs, evaluated=evaluated)


def calm(lab):
    """Many pairs a step, and every rate to the end: which rate and step count is read off the tuning prompts."""
    jobs = lab.jobs("calm", CALM.seeds, ["foreign", "own"], CALM.rows, CALM.learning_rates, CALM.betas)
    for seed, pairs, name, learning_rate, beta in jobs:
        row = dataclasses.replace(ROWS[name], learning_rate=learning_rate, beta=beta)
        lab.run("calm", name, row, seed, CALM, pairs, ["tuning", "report"])


@torch.no_grad()
def inversion(lab):
    """How good each inversion is: std(tau), RMS of tau's distance to a fine one, of the round trip, of eps - tau."""
    path, bed = lab.results / "inversion.csv", lab.bed
    for seed, timestep in lab.jobs("inversion", INVERSION_SEEDS, INVERSION_TIMESTEPS):
        if (str(seed), str(timestep)) in known(path, ["seed", "t"]):
            continue
        pairs, generator = lab.pairs("foreign"), torch.Generator().manual_seed(seed)
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


def ascent(lab):
    """What a step along the gradient of each noising does to the reward: how much of a preference arrives.

    The step is Adam's first: every weight by `ASCENT_STEP` in the direction of its gradient's sign. The gain is half
    the difference between a step forward and one back, for the same prompts and noise; its error that of the mean
    over images.
    """
    path, bed, prompts = lab.results / "ascent.csv", lab.bed, lab.prompts("tuning")
    weights, texts = flat(bed.unet.parameters()), prompts.texts.repeat_interleave(ASCENT_IMAGES, 0)

    def write(pairs, name, directions):
        rows = []
        for kind, direction in directions.items():
            rewards = []
            for step in (ASCENT_STEP, -ASCENT_STEP):
                unet, generator = bed.new_policy(), torch.Generator().manual_seed(ASCENT_SEED)
                torch.nn.utils.vector_to_parameters(weights + step * direction.sign(), unet.parameters())
                with torch.no_grad():
                    pictures = bed.decode(bed.sample(unet, prompts, ASCENT_IMAGES, generator))
                    rewards.append(bed.rewards(pictures, texts))
            gains = (rewards[0] - rewards[1]) / 2
            about = {"pairs": pairs, "noising": name, "labels": kind}
            rows.append({**about, "gain": gains.mean().item(), "error": (gains.std() / len(gains) ** 0.5).item()})
        append(path, rows)

    if ("", "random") not in known(path, ["pairs", "noising"]):
        write("", "random", {"": torch.randn(weights.shape, generator=torch.Generator().manual_seed(ASCENT_SEED))})
    for _, source, name in lab.jobs("ascent", [ASCENT_SEED], ["foreign", "own"], NOISINGS):
        if (source, name) not in known(path, ["pairs", "noising"]):
            pairs, unet = lab.pairs(source), bed.new_policy()
            order = order_of(len(pairs), ASCENT_BATCHES * ASCENT_PAIRS, ASCENT_SEED).split(ASCENT_PAIRS)
            batches = [draw_batch(pairs, pairs.soft, chosen, ASCENT_SEED, k) for k, chosen in enumerate(order)]
            gradients = [preference_gradients(bed, NOISINGS[name], unet, batch) for batch in batches]
            write(source, name, {kind: sum(gradient[kind] for gradient in gradients) for kind in gradients[0]})


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


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


PARTS = {"inversion": inversion, "ascent": ascent, "tune": tune, "grid": grid, "calm": calm}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS], help="What to run, in this order.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the CSVs.")
    parser.add_argument("--seeds", nargs="+", type=int, help="Only these of a part's seeds.")
    parser.add_argument("--time_limit", type=float, help="Seconds after which nothing new is begun.")
    return parser.parse_args(input_args)


def main(args):
    logging.disable(logging.INFO)
    args.results.mkdir(parents=True, exist_ok=True)
    lab = Lab(args.results, args.seeds, args.time_limit)
    for part in list(PARTS) if "all" in args.parts else args.parts:
        PARTS[part](lab)


if __name__ == "__main__":
    main(parse_args())
