# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Rounds on the tiny model: draw, label, train, and so on from there, against one offline run of as many UNet calls.

    python tests/ablation/rounds.py        # with --noising forward by forward noise
    python tests/ablation/make_tables.py   # its table in README.md

A round draws four images for each of fresh prompts, labels the best against the worst by the labelling model, and
trains on them from the last round's model. All variants train with the same prompts, timesteps and noise; "offline" is
trained in as many pieces, too. They are scored on prompts of their own, by the judge, who made no label, as well. A
variant that is in the CSV is not run again, so a stopped run goes on where it was.
"""

import argparse
import copy
import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch
from bed import SAMPLING_STEPS, Bed, chosen, in_batches, joined, order_of, stored_range
from make_tables import RESULTS
from run_ablation import ROWS, Lab, train


ROUNDS, STEPS, PAIRS_PER_STEP = 3, 3, 48
PROMPTS, IMAGES_PER_PROMPT = 36, 4  # of a round, so every pair comes four times, each time at another t
SEEDS = range(5)


class Variant(NamedTuple):
    sampler: str  # "last", the model of the last round, or "base"
    reference: str
    share_new: float = 1.0  # of the pairs of a step; the others are foreign ones


VARIANTS = {
    "offline": Variant("base", "base"),
    "rounds": Variant("last", "last"),
    "rounds_to_base": Variant("last", "base"),
    "mix": Variant("last", "last", share_new=0.25),  # as in SAIL (https://arxiv.org/abs/2602.05380)
    "foreign": Variant("base", "base", share_new=0.0),
}


@torch.no_grad()
def drawn_pairs(bed, unet, num_prompts, generator):
    """The best against the worst of the images that `unet` draws for each of fresh prompts; and the UNet calls."""
    prompts = bed.training_prompts(num_prompts, generator)
    pictures = bed.decode(bed.sample(unet, prompts, IMAGES_PER_PROMPT, generator))
    texts = prompts.texts.repeat_interleave(IMAGES_PER_PROMPT, 0)
    rewards = torch.cat([bed.rewards(*some) for some in in_batches(pictures, texts)]).view(num_prompts, -1)
    places = torch.stack([rewards.argmax(1), rewards.argmin(1)]) + IMAGES_PER_PROMPT * torch.arange(num_prompts)
    return bed.labelled(prompts, pictures[places.flatten()], stored_range()), len(pictures) * SAMPLING_STEPS


def rounds(bed, variant, row, foreign, seed):
    """Yields (UNet, UNet calls so far) after every step of all rounds.

    Args:
        foreign: pairs that are not drawn, none of which is trained on twice.
    """
    unet, all_calls = bed.new_policy(), 0
    num_trained = STEPS * PAIRS_PER_STEP
    num_new = round(variant.share_new * num_trained)
    order = order_of(len(foreign.soft), ROUNDS * (num_trained - num_new), seed)
    for number in range(ROUNDS):
        last = copy.copy(bed)
        last.unet = copy.deepcopy(unet).requires_grad_(False)
        models = {"last": last, "base": bed}
        pairs = chosen(foreign, order[number::ROUNDS])
        if num_new:
            generator = torch.Generator().manual_seed(1000 * (seed + 1) + number)
            num_prompts = round(variant.share_new * PROMPTS)
            new, calls = drawn_pairs(bed, models[variant.sampler].unet, num_prompts, generator)
            pairs, all_calls = joined(pairs, chosen(new, torch.arange(num_new) % num_prompts)), all_calls + calls
        steps = train(models[variant.reference], row, pairs, ROUNDS * seed + number, PAIRS_PER_STEP, STEPS, unet)
        for unet, calls in steps:
            yield unet, all_calls + calls
        all_calls += calls


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noising", choices=["released", "forward"], default="released", help="Where x_t comes from.")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="Only these.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of rounds.csv.")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"Only these of {len(SEEDS)}.")
    parser.add_argument("--time_limit", type=float, help="Seconds after which nothing new is begun.")
    return parser.parse_args(input_args)


def main(args):
    logging.disable(logging.INFO)
    args.results.mkdir(parents=True, exist_ok=True)
    lab = Lab(args.results, None, Bed(), args.seeds, time.monotonic() + args.time_limit if args.time_limit else None)
    row = ROWS[f"{args.noising}_soft"]
    for seed, name in lab.jobs("rounds", SEEDS, args.variants):
        about = {"part": "rounds", "name": name, "pairs": "drawn", "seed": seed, "pairs_per_step": PAIRS_PER_STEP}
        lab.record(
            args.results / "rounds.csv", about | vars(row), "report", [ROUNDS * STEPS],
            lambda: rounds(lab.bed, VARIANTS[name], row, lab.pairs("foreign"), seed),
        )  # fmt: skip


if __name__ == "__main__":
    main(parse_args())
