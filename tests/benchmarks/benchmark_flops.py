# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""What the arithmetic costs: floating-point operations of one pair and of the published runs.

    python tests/benchmarks/benchmark_flops.py

The networks are built in their published configurations on PyTorch's meta device, which has shapes and no data, and
PyTorch's counter adds up what one forward pass multiplies. The script's own `invert` is asked how many predictions it
takes on average over all timesteps. A backward pass counts twice a forward pass, gradient checkpointing once more.
Text encoders are left out: a prompt is a hundredth of an image. The hours are what the arithmetic alone would take at
the given rates; no machine is that fast.
"""

import argparse

import torch
from random_models import PIXELS, make_unet, make_vae
from torch.utils.flop_counter import FlopCounterMode

from train_smpo_sd15 import invert


NAMES = {"sd15": "SD1.5", "sdxl": "SDXL"}
PAIRS = 204_800  # of a published run: 200 steps of 1024
RATES = [790, 312]  # TFLOP/s of matrix products in bf16: what one H200 was measured at, and an A800's peak
T = 1000
# name: arguments of `invert` behind the noise schedule, None for the forward process
METHODS = {
    "forward noising": None,
    "released code, 5 levels": (5, "released", "last_move"),
    "released code, 10 levels": (10, "released", "last_move"),
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
    counted = []

    def predict_noise(x, t, rows):
        counted.append(len(x))
        return x

    if method is not None:
        invert(predict_noise, torch.zeros(T, 1), torch.arange(T), torch.linspace(0.999, 0.005, T), *method)
    return sum(counted) / T


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(input_args)  # for --help
    rates = [f"hours at {rate} TFLOP/s" for rate in RATES]
    print(f"| {PAIRS:,} pairs | UNet passes a pair | TFLOP a pair | {' | '.join(rates)} |\n" + "|---" * 5 + "|")
    for kind in PIXELS:
        unet, vae = forward_flops(kind)
        for name, method in METHODS.items():
            # For each image the inversion, the reference, the policy there and back, and SDXL's checkpointing.
            passes = 2 * (predictions(method) + 1 + 3 + (kind == "sdxl"))
            total = 2 * vae + passes * unet
            hours = [f"{PAIRS * total / rate / 1e12 / 3600:.1f}" for rate in RATES]
            print(f"| {NAMES[kind]}, {name} | {passes:.0f} | {total / 1e12:.1f} | {' | '.join(hours)} |")


if __name__ == "__main__":
    main()
