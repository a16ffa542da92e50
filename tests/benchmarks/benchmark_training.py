# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Speed of the training scripts beside the authors' recipe, on random weights of the published configurations.

    python tests/benchmarks/benchmark_training.py      # on a GPU: all of it, unattended
    python tests/benchmarks/benchmark_training.py --cases tiny-full small-full --batch_sizes 1 4 16

For every case and micro-batch size it runs the script's own data loading, `invert_and_judge`, `training_step`,
backward pass and optimiser with the paper's inversion, in bf16 on a GPU and in fp32 on a CPU, and prints a row. The
other rows are the same work done otherwise:

* the authors' recipe: `--noising released`, one pair at a time, autocast's own casts, every weight rounded at every
  call, AdamW parameter by parameter, a number read back after every pair;
* the script with its micro-batches inverted one by one;
* Diffusion-DPO, which inverts nothing.

pairs/s is at 128 pairs a GPU and optimiser step, the published number: the time of a pair is measured on fewer, that
of the optimiser's step by itself. The ratio to the authors' recipe is at equal UNet calls: of pairs/s times UNet
forward passes a pair, where a policy pass with its gradient counts as three. The share of the matrix rate is of what a
large product in the same precision reaches here; TFLOP are counted by PyTorch, recomputed ones included.
"""

import argparse
import itertools
import time
from contextlib import nullcontext
from statistics import median
from unittest import mock

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from benchmark_relabel import make_photo
from random_models import casts_of_autocast, make_models, parse
from torch.utils.flop_counter import FlopCounterMode

import diffusers


PAIRS_A_STEP = 128  # of one GPU in the published recipe
NUM_PHOTOS = 16
TIME_LIMIT = 400  # seconds after which no row is begun
COLUMNS = ["case", "how", "pairs a micro-batch", "pairs/s", "ratio", "UNet forwards a pair", "UNet calls a pair"]
COLUMNS += ["TFLOP/s", "of the matrix rate", "GiB"]
SDXL_LORA = ["--rank", "16", "--gradient_checkpointing", "--optimizer", "adamw"]
# kind of network, pixels, flags
CASES = {
    "sd15-full": ("sd15", 512, []),
    "sd15-lora": ("sd15", 512, ["--rank", "16"]),
    "sdxl-full": ("sdxl", 1024, ["--gradient_checkpointing"]),
    "sdxl-lora": ("sdxl", 1024, SDXL_LORA),
    "tiny-full": ("tiny-sd15", 64, []),
    "tiny-lora": ("tiny-sd15", 64, ["--rank", "16"]),
    "tiny-sdxl-lora": ("tiny-sdxl", 64, SDXL_LORA),
    "small-full": ("small-sd15", 128, []),  # SD1.5 with a quarter of its width
}
MATRICES = {"cuda": (8192, 20), "cpu": (1536, 4)}  # side, number
REPEATS = {"cuda": 1, "cpu": 3}  # the median is taken, as CPUs have other things to do


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(function, repeats):
    seconds = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product."""
    size, count = MATRICES[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 * count / median_seconds(lambda: [a @ b for _ in range(count)], 3)


class Run:
    """The models of a case, and steps with them, on the device and in the precision of the process."""

    def __init__(self, name, dtype):
        self.case, self.state, self.dtype = CASES[name], PartialState(), dtype
        self.script, args = self.parse(1)
        scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.alpha_bar = scheduler.alphas_cumprod.to(self.state.device)
        self.models = make_models(self.case[0], self.script, args, self.state.device, dtype)
        self.parameters = [parameter for parameter in self.models["unet"].parameters() if parameter.requires_grad]

    def parse(self, batch_size, *further_flags):
        kind, resolution, flags = self.case
        return parse(kind, resolution, "--train_batch_size", batch_size, *flags, *further_flags)

    def batches(self, args, num_pairs):
        """Endless batches of the script's loader, always those of one step of `num_pairs` pairs: for other timesteps,
        so other sizes of the inversion's batches, a GPU would choose kernels anew within the time."""
        args.gradient_accumulation_steps = num_pairs // args.train_batch_size
        rng, rows = np.random.default_rng(0), np.arange(max(num_pairs, NUM_PHOTOS))
        photos = [make_photo(min(1024, args.resolution * 3 // 2), rng) for _ in range(NUM_PHOTOS)]
        captions = [f"a large red circle {i}" for i in range(NUM_PHOTOS)]
        data = datasets.Dataset.from_dict({"jpg_0": photos, "jpg_1": photos[::-1], "caption": captions})
        data = data.select(rows % NUM_PHOTOS)
        pairs = self.script.Pairs(data, rows, np.full(len(rows), 0.7, np.float32), None, None, 1000, args)
        keys, step = self.script.shuffled_keys(pairs, 0, 1, 0, args), []
        while sum(map(len, step)) < num_pairs:
            step.append(next(keys))
        return iter(self.script.make_loader(self.state, pairs, itertools.cycle(step), args))

    def steps(self, args, num_pairs, released=False):
        """A function that takes the next `num_pairs` pairs to their gradients, and returns the sum of the losses.

        It looks its parts up when it runs, so that they may be replaced to be counted.
        """

        def autocast():
            enabled = self.dtype != torch.float32
            return torch.autocast(self.state.device.type, self.dtype, enabled, cache_enabled=not released)

        context = self.script.Context(self.models, self.alpha_bar, "epsilon", autocast, args)
        batches = self.batches(args, num_pairs)

        def take():
            left, total = num_pairs, 0.0
            while left > 0:
                for micro_batch in self.script.invert_and_judge(next(batches), context):
                    loss, _ = self.script.training_step(micro_batch, context)
                    (loss / PAIRS_A_STEP).backward()
                    total += float(loss) if released else loss.detach()
                    left -= args.train_batch_size
            return float(total)

        return take

    def time(self, batch_size, num_pairs, flags=(), released=False):
        """Measures one way to train; a dict of numbers."""
        script, args = self.parse(batch_size, *flags)
        optimizer = script.make_optimizer(self.parameters, 1e-9, args)
        if released and isinstance(optimizer, torch.optim.AdamW):
            optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, foreach=False)
        take, repeats = self.steps(args, num_pairs, released), REPEATS[self.state.device.type]

        def optimiser_step():
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # so that the step can be timed alone

        calls, call_unet = {True: [], False: []}, script.call_unet

        def counted(unet, x_t, t, cond):
            calls[torch.is_grad_enabled()].append(len(x_t))
            return call_unet(unet, x_t, t, cond)

        with FlopCounterMode(display=False) as flops, mock.patch.object(script, "call_unet", counted):
            take()
        optimiser_step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        take()  # once more: kernels are chosen, memory is there
        pair_seconds = median_seconds(take, repeats) / num_pairs
        optimiser_seconds = median_seconds(optimiser_step, repeats)
        pairs_per_second = PAIRS_A_STEP / (PAIRS_A_STEP * pair_seconds + optimiser_seconds)
        return {
            "pairs/s": pairs_per_second,
            "UNet forwards a pair": (sum(calls[False]) + 3 * sum(calls[True])) / num_pairs,
            "UNet calls a pair": sum(map(len, calls.values())) / num_pairs,
            "TFLOP/s": flops.get_total_flops() / num_pairs * pairs_per_second / 1e12,
            "GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }


def plan_of(case, args):
    """What is measured of a case: how, pairs a micro-batch, pairs that are timed, options of `Run.time`."""
    sdxl = "sdxl" in case
    sizes = args.batch_sizes or ([1, 4, 8, 16] if sdxl else [1, 4, 8, 16, 32])
    num_pairs = max(args.num_pairs or (16 if sdxl else 32), *sizes)
    released = ["--noising", "released", "--inversion_batch_size", 1]
    plan = [("authors' recipe", 1, max(num_pairs // 4, 1), {"flags": released, "released": True})]
    plan += [("script", size, num_pairs, {}) for size in sizes]
    if not case.endswith("lora"):
        one_by_one = {"flags": ["--inversion_batch_size", 1]}
        plan.append(("inverted micro-batch by micro-batch", sizes[0], num_pairs, one_by_one))
        plan.append(("Diffusion-DPO", sizes[-1], num_pairs, {"flags": ["--noising", "forward"]}))
    return plan


def main(input_args=None):
    """Prints the table row by row, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES)[:4])
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="Pairs a micro-batch. Default: 1 4 8 16; SD1.5 32.")
    parser.add_argument("--num_pairs", type=int, help="Pairs that are timed. Default: 32 for SD1.5, 16 for SDXL.")
    args = parser.parse_args(input_args)
    start, device = time.perf_counter(), PartialState().device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype)
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'};"
        f" torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__};"
        f" matrix products in {dtype} reach {rate / 1e12:.3g} TFLOP/s."
    )
    print(f"\n| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    rows = []
    for case in args.cases:
        run = released = None
        for how, size, num_pairs, options in plan_of(case, args):
            if time.perf_counter() - start > TIME_LIMIT:
                return rows
            run = run or Run(case, dtype)
            row = {"case": case, "how": how, "pairs a micro-batch": size}
            try:
                with casts_of_autocast(run.models) if options.get("released") else nullcontext():
                    row |= run.time(size, num_pairs, **options)
                throughput = row["pairs/s"] * row["UNet forwards a pair"]
                released = released or throughput
                row |= {"ratio": throughput / released, "of the matrix rate": row["TFLOP/s"] * 1e12 / rate}
            except torch.OutOfMemoryError:
                row["GiB"] = "OOM"
            rows.append(row)
            formats = dict.fromkeys(COLUMNS, ".2f") | {"of the matrix rate": ".0%"}
            cells = [format(v, formats[c]) if isinstance(v := row.get(c), float) else str(v or "") for c in COLUMNS]
            print(f"| {' | '.join(cells)} |", flush=True)
        del run
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
