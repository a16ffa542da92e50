# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Ideas that only a GPU can judge, one at a time, each beside the script as it is.

    python tests/benchmarks/benchmark_ideas.py sd15-full        # or another case of benchmark_training.py

An idea is worth its lines if pairs/s grow by a tenth, while std(tau) stays within a rounding of the precision.
"""

import argparse
from contextlib import nullcontext
from unittest import mock

import torch
from benchmark_training import CASES, Run
from peft.tuners.lora import LoraLayer


def contiguous(run):
    """No channels_last."""
    for part in ("unet", "ref_unet", "vae"):
        if run.models[part] is not None:
            run.models[part].to(memory_format=torch.contiguous_format)


def cudnn_benchmark(run):
    """cuDNN tries its algorithms out."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


def half_inversion(run):
    """The inversion's weights are rounded once and norms with them, without autocast."""
    script, unet, invert = run.script, run.models["unet"], run.script.invert

    def inverted(*inputs):
        weights = {name: weight.to(run.dtype) for name, weight in unet.named_parameters() if weight.dtype != run.dtype}

        def policy(x_t, t, **cond):
            return torch.func.functional_call(unet, weights, (x_t.to(run.dtype), t), cond)

        def predict_eps(_, x_t, t, cond, context):
            return script.call_unet(policy, x_t, t, cond).float()

        off = torch.autocast(run.state.device.type, enabled=False)
        with mock.patch.object(script, "predict_eps", predict_eps), off:
            return invert(*inputs)

    return mock.patch.object(script, "invert", inverted)


def lora_without_casts(run):
    """peft does not take to fp32 what autocast takes back; norms are in fp32, as autocast wants them."""
    for module in run.models["unet"].modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float()


def compiled_blocks(run):
    """Transformer blocks compiled, in policy and reference."""
    for part in ("unet", "ref_unet"):
        if run.models[part] is not None:
            run.models[part].compile_repeated_blocks(dynamic=True)


BATCH_SIZE = 8  # pairs a micro-batch
IDEAS = [None, half_inversion, lora_without_casts, contiguous, cudnn_benchmark, compiled_blocks]


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
        if idea is lora_without_casts and "lora" not in args.case:
            continue
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
