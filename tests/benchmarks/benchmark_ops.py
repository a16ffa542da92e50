# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""What an optimiser step makes a GPU do besides its products, counted on any machine.

    python tests/benchmarks/benchmark_ops.py [--cases CASE ...]

The networks have their published sizes and lie on PyTorch's meta device, which has shapes and no data and stands for
the GPU; what is on the CPU is real. The script's own `optimiser_steps` takes a step there in bf16, under CUDA's
autocast: which functions it rounds and which it keeps in fp32 is read from PyTorch's header, and the rule by which it
keeps a rounded weight is followed. Attention is the flash kernel. Per pair and phase are counted:

* kernels: operations that compute or copy. Views and allocations are none; an operation on a list of tensors is as
  many as CUDA's multi-tensor kernels cover it with. Some operations are several kernels really, such as a norm's.
* MB moved: what operations other than convolutions, matrix products and attention read and write, each once.
* MB of weights: the part of it that rounds trained weights, turns their gradients back into fp32 and adds them up.
* syncs and copies: how often the CPU waits for a number of the GPU, and copies from and to the GPU.

A step has 16 pairs, whose timesteps are spread evenly, all inverted together; what happens once a step is told for the
published 128 pairs of a GPU.
"""

import argparse
import itertools
import re
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from random_models import PIXELS, casts_of_autocast, make_batch, make_models, parse
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


PAIRS, PAIRS_A_STEP = 16, 128
BATCH_SIZES = [1, 4, 8, 16]
SDXL = ["--gradient_checkpointing"]
SUPPORTED = [
    "torch.utils._foreach_utils._get_foreach_kernels_supported_devices",
    "torch.optim.optimizer._get_foreach_kernels_supported_devices",
    "torch.optim.optimizer._get_fused_kernels_supported_devices",
]
# kind, flags of the training script
CASES = {
    "SD1.5 full": ("sd15", []),
    "SD1.5 LoRA": ("sd15", ["--rank", "16"]),
    "SDXL full": ("sdxl", SDXL),
    "SDXL LoRA": ("sdxl", [*SDXL, "--rank", "16", "--optimizer", "adamw"]),
}
PHASES = ["VAE", "text", "inversion", "reference", "policy", "optimiser"]
COLUMNS = ["kernels", "MB moved", "MB of weights", "syncs", "copies"]
PRODUCTS = re.compile(r"aten\.(convolution|mm|addmm|bmm|baddbmm|_scaled_dot_product)")
NOTHING = re.compile(r"aten\.(new_)?empty")
GATHERS = re.compile(r"aten\.(embedding|index|index_select|gather|copy_)\.")  # which read as much as they write
FILLS = re.compile(r"aten\.(fill_|zero_)\.")
CASTS = re.compile(r"aten\.(_to_copy\.default|add_\.Tensor)")
LISTS = re.compile(r"aten\._(foreach|fused)_")
CHUNKS_A_KERNEL, CHUNK = 320, 65_536  # of torch's multi_tensor_apply


def autocast_names(policy):
    """The functions of a policy of CUDA's autocast, as torch/include/ATen/autocast_mode.h lists them."""
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()
    return set(re.findall(r"_\((\w+)", re.search(rf"#define {policy}\(_\)(.*?)\n\n", header, re.S)[1]))


class CudaAutocast(TorchFunctionMode):
    """Treats tensors on the meta device as CUDA's autocast does, wherever that of the CPU is switched on."""

    def __init__(self):
        super().__init__()
        self.rounded = {}  # weights, until the outermost autocast ends
        self.half = autocast_names("AT_FORALL_LOWER_PRECISION_FP")
        self.float32 = autocast_names("AT_FORALL_FP32") | {"interpolate"}  # which calls upsample_*

    def cast(self, tensor, dtype):
        if not tensor.is_meta or not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if dtype == torch.float32 or not (tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf):
            return tensor.to(dtype)
        if id(tensor) not in self.rounded:
            self.rounded[id(tensor)] = tensor.to(dtype)
        return self.rounded[id(tensor)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        torch.autocast_increment_nesting()
        if not torch.autocast_decrement_nesting():  # how deep it is nested, switched on or off
            self.rounded.clear()
        if torch.is_autocast_enabled("cpu") and name in self.half | self.float32:
            dtype = torch.get_autocast_dtype("cpu") if name in self.half else torch.float32
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: self.cast(tensor, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return flash_attention(*args, **kwargs)
        return function(*args, **kwargs)


def within(make_context, function):
    """The function, called within a new context."""

    def wrapper(*args, **kwargs):
        with make_context():
            return function(*args, **kwargs)

    return wrapper


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


class Operations(TorchDispatchMode):
    """Counts what runs on the meta device, by phase: `counts[phase]` is a `Counter` of `COLUMNS`."""

    def __init__(self, weights):
        super().__init__()
        self.counts, self.phases, self.shapes = defaultdict(Counter), ["optimiser"], {w.shape for w in weights}

    @contextmanager
    def phase(self, name):
        self.phases.append(name)
        yield
        self.phases.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, counts, name = kwargs or {}, self.counts[self.phases[-1]], str(function)
        inputs = [value for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        if name == "aten._local_scalar_dense.default" and inputs[0].is_meta:
            counts["syncs"] += 1
            return 1.0 if inputs[0].is_floating_point() else 1
        if name == "aten._to_copy.default" and inputs[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            counts.update(syncs=1, copies=1)
            return torch.ones(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)
        output = function(*args, **kwargs)
        written = [value for value in tree_leaves(output) if torch.is_tensor(value)]
        if function._schema.is_mutable:
            changed = [a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments]
            written = [
                value for value in tree_leaves(list(itertools.compress(args, changed))) if torch.is_tensor(value)
            ]
        elif {value.untyped_storage()._cdata for value in written} <= {v.untyped_storage()._cdata for v in inputs}:
            return output  # a view
        if not any(value.is_meta for value in written) or NOTHING.match(name):
            return output
        if any(not value.is_meta and value.ndim for value in inputs):
            counts["copies"] += 1
            return output
        chunks = sum(-(-value.numel() // CHUNK) for value in tree_leaves(args[0])) if LISTS.match(name) else 1
        counts["kernels"] += -(-chunks // CHUNKS_A_KERNEL)
        if not PRODUCTS.match(name):
            read = written if GATHERS.match(name) else [] if FILLS.match(name) else inputs
            megabytes = (sum(map(bytes_of, read)) + sum(map(bytes_of, written))) / 1e6
            counts["MB moved"] += megabytes
            if CASTS.match(name) and written[0].shape in self.shapes and self.phases[-1] != "optimiser":
                counts["MB of weights"] += megabytes
        return output


def bytes_of(tensor):
    """Of the elements of a tensor in memory: one that is expanded is read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return torch.Size(sizes).numel() * tensor.element_size()


def count(kind, resolution, flags, pairs=PAIRS, autocast_alone=False):
    """`{phase: Counter}` of an optimiser step of so many pairs, for each pair."""
    script, args = parse(kind, resolution, *flags)
    args.gradient_accumulation_steps = pairs // args.train_batch_size
    models = make_models(kind, script, args, "meta", torch.bfloat16)
    parameters = [parameter for parameter in models["unet"].parameters() if parameter.requires_grad]
    batches = iter([make_batch(script, args, [(2 * i + 1) * 1000 // (2 * pairs) for i in range(pairs)])])
    alpha_bar = torch.linspace(0.999, 0.005, 1000, device="meta")
    context = script.Context(models, alpha_bar, "epsilon", lambda: autocast("cpu", torch.bfloat16), args)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    operations = Operations(parameters)
    phases = {"encode_images": "VAE", "encode_prompts": "text", "invert": "inversion", "invert_and_judge": "reference"}
    phases["training_step"] = "policy"
    autocast = torch.autocast  # which knows no device "meta"
    with ExitStack() as stack:
        if autocast_alone:
            stack.enter_context(casts_of_autocast(models))
        stack.enter_context(mock.patch("torch.autocast", lambda _, **options: autocast("cpu", **options)))
        for supported in SUPPORTED:
            stack.enter_context(mock.patch(supported, lambda: ["meta"]))
        for name, phase in phases.items():
            counted = within(partial(operations.phase, phase), getattr(script, name))
            stack.enter_context(mock.patch.object(script, name, counted))
        backward = within(partial(operations.phase, "policy"), accelerator.backward)
        stack.enter_context(mock.patch.object(accelerator, "backward", backward))
        optimizer = accelerator.prepare(script.make_optimizer(parameters, 1e-5, args))
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # which makes its state
        stack.enter_context(operations)
        stack.enter_context(CudaAutocast())
        # Functions that PyTorch's own call are not seen; what checkpointing computes again has to be.
        engine = torch.autograd._engine_run_backward
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", within(CudaAutocast, engine)))
        next(script.optimiser_steps(accelerator, batches, optimizer, scheduler, script.Progress(), [], context))
    for phase, counts in operations.counts.items():
        for name in counts:
            counts[name] /= PAIRS_A_STEP if phase == "optimiser" else pairs
    return operations.counts


def by_batch_size(kind, flags, autocast_alone):
    """For each number of pairs a micro-batch, `{phase: Counter}` for each pair."""
    whole = count(kind, PIXELS[kind], [*flags, "--train_batch_size", PAIRS], PAIRS, autocast_alone)
    for size in BATCH_SIZES:
        # Pairs are inverted together whatever the micro-batch is, and micro-batches are alike: one will do.
        one = ["--noising", "ddim", "--num_inversion_steps", 1, "--train_batch_size", size]
        alone = whole if size == PAIRS else count(kind, PIXELS[kind], [*flags, *one], size, autocast_alone)
        copies = {"copies": whole["reference"]["copies"]}
        counts = {**whole, "policy": alone["policy"], "reference": Counter({**alone["reference"], **copies})}
        yield size, {**counts, "all": sum(counts.values(), Counter())}


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--autocast_alone", action="store_true", help="Norms, and what LoRA layers read, in fp32.")
    args = parser.parse_args(input_args)
    print(f"| a pair of | pairs a micro-batch | phase | {' | '.join(COLUMNS)} |\n" + "|---" * 8 + "|")
    for case in args.cases:
        for size, counts in by_batch_size(*CASES[case], args.autocast_alone):
            for phase in [*PHASES, "all"]:
                numbers = [counts[phase][name] for name in COLUMNS]
                cells = [f"{number:,.0f}" if number >= 10 or not number else f"{number:.2f}" for number in numbers]
                print(f"| {case} | {size} | {phase} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
