# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Memory of training with the published configurations of SD1.5 and SDXL, counted on any machine.

    python tests/benchmarks/benchmark_memory.py [--cases CASE ...]

It needs no memory and no GPU: the networks hold fake tensors, which have shapes and no data, and the script's own
`invert_and_judge`, `training_step`, backward pass, clipping and optimiser run on them twice, while every storage that
is alive is added up. What it leaves out: the CUDA context, the work space of cuDNN and the allocator's rounding.
`benchmark_training.py` measures memory on a GPU.
"""

import argparse
import weakref
from contextlib import contextmanager
from unittest import mock

import torch
from random_models import PIXELS, make_batch, make_models, parse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


GIB = 2**30
CHECKPOINTING = "--gradient_checkpointing"
SDXL_LORA = [CHECKPOINTING, "--rank", 16, "--optimizer", "adamw"]
# kind, flags of the training script
CASES = {
    "SD1.5 LoRA, rank 16": ("sd15", [CHECKPOINTING, "--rank", 16]),
    "SD1.5 full, AdamW": ("sd15", [CHECKPOINTING]),
    "the same, 8 pairs a micro-batch": ("sd15", [CHECKPOINTING, "--train_batch_size", 8]),
    "SD1.5 full, AdamW, without checkpointing": ("sd15", []),
    "the same without checkpointing, 8 pairs a micro-batch": ("sd15", ["--train_batch_size", 8]),
    "SD1.5 full, Adafactor": ("sd15", [CHECKPOINTING, "--optimizer", "adafactor"]),
    "SDXL LoRA, rank 16, AdamW": ("sdxl", SDXL_LORA),
    "the same, 4 pairs a micro-batch": ("sdxl", [*SDXL_LORA, "--train_batch_size", 4]),
    "the same with `--offload`, one pair": ("sdxl", [*SDXL_LORA, "--offload"]),
    "SDXL full, Adafactor": ("sdxl", [CHECKPOINTING]),
    "the same full, 4 pairs a micro-batch": ("sdxl", [CHECKPOINTING, "--train_batch_size", 4]),
    "the same full with `--offload`, one pair": ("sdxl", [CHECKPOINTING, "--offload"]),
}


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that came into being under it and are alive, and remembers the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, output)
        return output

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.add(storage.nbytes())
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    @contextmanager
    def moved_in(self, *networks, device, offload):
        """Stands in for diffusers' `offload_models`: networks that lie elsewhere weigh something in here."""
        size = sum(bytes_of(network.parameters()) for network in networks) if offload else 0
        self.add(size)
        yield
        self.now -= size


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(kind, resolution, flags):
    """Bytes of the parts of an optimiser step of two batches, one pair a micro-batch unless flags say otherwise, in
    bf16: a dict whose last item is the peak."""
    # One more UNet call without gradient takes time and no memory: two moves will do.
    script, args = parse(kind, resolution, "--train_batch_size", 1, "--num_inversion_steps", 2, *flags)
    live = LiveBytes()
    models = make_models(kind, script, args, "meta", torch.bfloat16)
    networks = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    frozen = [bytes_of(network.parameters()) for name, network in networks.items() if name != "unet"]
    batch_size = max(args.train_batch_size, args.inversion_batch_size)
    with live:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for network in networks.values():
                network.to_empty(device="cpu")  # from the meta device
        live.now -= sum(frozen) if args.offload else 0
        parameters = [parameter for parameter in models["unet"].parameters() if parameter.requires_grad]
        optimizer = script.make_optimizer(parameters, 1e-5, args)
        alpha_bar = torch.linspace(0.999, 0.005, 1000)
        context = script.Context(models, alpha_bar, "epsilon", lambda: torch.autocast("cpu", torch.bfloat16), args)
        live.peak = 0
        with mock.patch.object(script, "offload_models", live.moved_in):
            for _ in range(2):
                for _ in range(2):  # the second batch is inverted while there are gradients of the first
                    batch = make_batch(script, args, [999] * batch_size)
                    micro_batch, *_ = script.invert_and_judge(batch, context)
                    loss, _ = script.training_step(micro_batch, context)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    sizes = {name: 0 if args.offload else bytes_of(network.parameters()) for name, network in networks.items()}
    del sizes["unet"]
    parts = {
        "weights": bytes_of(models["unet"].parameters()), "reference": sizes.pop("ref_unet", 0),
        "VAE, text": sum(sizes.values()), "gradients": bytes_of(parameters),
        "optimiser": bytes_of(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)),
    }  # fmt: skip
    return {**parts, "the rest": live.peak - sum(parts.values()), "peak": live.peak}


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args(input_args)
    for i, name in enumerate(args.cases):
        kind, flags = CASES[name]
        *parts, peak = count(kind, PIXELS[kind], flags).items()
        if i == 0:
            print(f"| | {' | '.join(part for part, _ in parts)} | peak |\n" + "|---" * (len(parts) + 2) + "|")
        cells = [f"{size / GIB:.2f}" if size else "" for _, size in parts]
        print(f"| {name} | {' | '.join(cells)} | **{peak[1] / GIB:.1f}** |", flush=True)


if __name__ == "__main__":
    main()
