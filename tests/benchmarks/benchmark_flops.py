# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""What the arithmetic costs: floating-point operations of one image, of one pair and of the published runs.

    python tests/benchmarks/benchmark_flops.py [--pairs 204800] [--tflops_per_second 790 312]

The networks are built in their published configurations on PyTorch's meta device, which has shapes and no data, and
PyTorch's counter adds up what one forward pass multiplies. The script's own `invert` is asked how many predictions it
takes on average over all timesteps. A backward pass counts twice a forward pass, gradient checkpointing once more.
Text encoders are left out: a prompt is a hundredth of an image. The hours are what the arithmetic alone would take at
the given rates; no machine is that fast.
"""

import argparse
import sys
from pathlib import Path

import torch
from random_models import make_unet, make_vae
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from train_smpo_sd15 import invert  # noqa: E402


PIXELS = {"sd15": 512, "sdxl": 1024}
NAMES = {"sd15": "SD1.5", "sdxl": "SDXL"}
T = 1000
# name: arguments of `invert` behind the noise schedule, None for the forward process
METHODS = {
    "forward noising": None,
    "DDIM, 9 moves": (9, "ddim", "last_move"),
    "ReNoise, 9 moves, last one corrected": (9, "renoise", "last_move"),
    "ReNoise, 5 moves, every one corrected": (5, "renoise", "every_move"),
    "ReNoise, 9 moves, every one corrected": (9, "renoise", "every_move"),
}


def forward_flops(kind):
    """Operations of one forward pass for one image: the UNet's, and the VAE encoder's."""
    side = PIXELS[kind] // 8
    with torch.device("meta"), torch.no_grad():
        unet, vae = make_unet(kind), make_vae(kind)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if kind == "sdxl" else None
        states = torch.zeros(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as of_unet:
            unet(torch.zeros(1, 4, side, side), torch.zeros(1), states, added_cond_kwargs=added)
        with FlopCounterMode(display=False) as of_vae:
            vae.encode(torch.zeros(1, 3, PIXELS[kind], PIXELS[kind]))
    return of_unet.get_total_flops(), of_vae.get_total_flops()


def predictions(method):
    """UNet predictions that the inversion of an image takes, averaged over all timesteps."""
    if method is None:
        return 0.0
    counted = 0

    def predict_noise(x, t, rows):
        nonlocal counted
        counted += len(x)
        return x

    invert(predict_noise, torch.zeros(T, 1), torch.arange(T), torch.linspace(0.999, 0.005, T), *method)
    return counted / T


def pair_flops(unet, vae, num_predictions, checkpointing):
    """Operations of a training pair: for each image VAE, inversion, reference, and the policy there and back."""
    return 2 * (vae + unet * (num_predictions + 1 + 3 + checkpointing))


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=204_800, help="Pairs of a run. Published: 200 steps of 1024.")
    parser.add_argument(
        "--tflops_per_second", type=float, nargs="+", default=[790, 312],
        help="Rates of matrix products. Default: what one H200 was measured at in bf16, and an A800's peak.",
    )  # fmt: skip
    args = parser.parse_args(input_args)
    flops = {kind: forward_flops(kind) for kind in PIXELS}
    print("| TFLOP, one image, forward | SD1.5 at 512 | SDXL at 1024 |\n|---|---|---|")
    for i, network in enumerate(("UNet", "VAE encoder")):
        print(f"| {network} | " + " | ".join(f"{of_kind[i] / 1e12:.3f}" for of_kind in flops.values()) + " |")
    rates = [f"hours at {rate:.0f} TFLOP/s" for rate in args.tflops_per_second]
    print(f"\n| {args.pairs:,} pairs | UNet passes a pair | TFLOP a pair | {' | '.join(rates)} |")
    print("|---" * (3 + len(rates)) + "|")
    for kind, (unet, vae) in flops.items():
        for name, method in METHODS.items():
            checkpointing = kind == "sdxl"
            passes = predictions(method)
            total = pair_flops(unet, vae, passes, checkpointing)
            hours = [f"{args.pairs * total / rate / 1e12 / 3600:.1f}" for rate in args.tflops_per_second]
            cells = [f"{2 * (passes + 4 + checkpointing):.0f}", f"{total / 1e12:.1f}", *hours]
            print(f"| {NAMES[kind]}, {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
