# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Ideas that only a GPU can judge, one at a time, each beside the script as it is.

    python tests/benchmarks/benchmark_ideas.py sd15-full        # or another case of benchmark_training.py

An idea is worth its lines if pairs/s grow by a tenth, while std(tau) stays within a rounding of the precision. What
the script does already is undone, to see what it brings.
"""

import argparse
from contextlib import nullcontext
from unittest import mock

import torch
from benchmark_training import CASES, Run
from random_models import casts_of_autocast


def autocast_alone(run):
    """Norms in fp32, and what LoRA layers read, as autocast and peft have them."""
    return casts_of_autocast(run.models)


def contiguous(run):
    """No channels_last."""
    for part in ("unet", "ref_unet", "vae"):
        if run.models[part] is not None:
            run.models[part].to(memory_format=torch.contiguous_format)


def cudnn_benchmark(run):
    """cuDNN tries its algorithms out."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


def compiled_blocks(run):
    """Transformer blocks compiled, in policy and reference."""
    for part in ("unet", "ref_unet"):
        if run.models[part] is not None:
            run.models[part].compile_repeated_blocks(dynamic=True)


BATCH_SIZE = 8  # pairs a micro-batch
IDEAS = [None, autocast_alone, contiguous, cudnn_benchmark, compiled_blocks]


def measure(idea, case, num_pairs):
    """Numbers of `Run.time` with an idea, and the mean std(tau) of the pairs."""
    run = Run(case, torch.bfloat16)
    step, found = run.script.training_step, []

    def noted(*inputs):
        loss, metrics = step(*inputs)
        found.append(metrics["std_tau"])
        return loss, metrics

    with (idea(run) if idea else None) or nullcontext(), mock.patch.object(run.script, "training_step", noted):
        numbers = run.time(BATCH_SIZE, num_pairs)
    return {**numbers, "std(tau)": float(torch.stack(found[: num_pairs // BATCH_SIZE]).mean())}


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--num_pairs", type=int, default=16, help="Pairs that are timed.")
    args = parser.parse_args(input_args)
    columns = ["pairs/s", "std(tau)", "GiB"]
    print(f"| {args.case} | {' | '.join(columns)} |\n" + "|---" * 4 + "|")
    for idea in IDEAS:
        if idea in (cudnn_benchmark, compiled_blocks) and not torch.cuda.is_available():
            continue
        try:
            numbers = measure(idea, args.case, args.num_pairs)
            cells = [f"{numbers[name]:.5g}" if numbers[name] else "" for name in columns]
        except Exception as error:  # of a compiler, or of memory: the others are still measured
            cells = [f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__]
        print(f"| {idea.__doc__ if idea else 'as it is'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
