# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Memory of training with the published configurations of SD1.5 and SDXL, counted on any machine or measured on a GPU.

    python tests/benchmarks/benchmark_memory.py count [--cases CASE ...] [-- FLAGS OF THE TRAINING SCRIPT]
    python tests/benchmarks/benchmark_memory.py measure [--work_dir FOLDER] [-- FLAGS OF THE TRAINING SCRIPT]

`count` needs no memory and no GPU: the networks hold fake tensors, which have shapes and no data, and the script's own
`invert_and_judge`, `training_step`, backward pass, clipping and optimiser run on them twice, while every storage that
is alive is added up. Norms run in fp32 as CUDA's autocast has them. What it leaves out: the CUDA context, the work
space of cuDNN and the allocator's rounding.

`measure` runs the training scripts for two steps on random weights (written once, in fp16) and the tiny pairs. On a
GPU it prints `torch.cuda.max_memory_allocated`; on a CPU, where it runs at 64 pixels, the peak resident memory.
"""

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import torch
from random_models import TINY, make_training_models, write_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

GIB = 2**30
CHECKPOINTING, LORA = "--gradient_checkpointing", ["--rank", "16"]
SDXL_LORA = [*LORA, CHECKPOINTING, "--optimizer", "adamw"]
# name: kind, pixels, flags of the training script
CASES = {
    "SD1.5 LoRA": ("sd15", 512, [*LORA, CHECKPOINTING]),
    "SD1.5 LoRA, no checkpointing": ("sd15", 512, LORA),
    "SD1.5 full, AdamW": ("sd15", 512, [CHECKPOINTING]),
    "SD1.5 full, AdamW, no checkpointing": ("sd15", 512, []),
    "SD1.5 full, Adafactor": ("sd15", 512, [CHECKPOINTING, "--optimizer", "adafactor"]),
    "SDXL LoRA": ("sdxl", 1024, SDXL_LORA),
    "SDXL LoRA, offload": ("sdxl", 1024, [*SDXL_LORA, "--offload"]),
    "SDXL full, Adafactor": ("sdxl", 1024, [CHECKPOINTING]),
    "SDXL full, Adafactor, offload": ("sdxl", 1024, [CHECKPOINTING, "--offload"]),
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


def in_float32(norm):
    """What CUDA's autocast does to group and layer norm and the CPU's does not: they take and give fp32."""

    def norm_in_float32(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return norm(*args, **kwargs)

    return norm_in_float32


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(kind, resolution, flags):
    """Peak bytes of an optimiser step of two batches, one pair a micro-batch, in bf16, and its parts' bytes."""
    script, functional, live = importlib.import_module(f"train_smpo_{kind}"), torch.nn.functional, LiveBytes()
    command = "--pretrained_model_name_or_path none --dataset_name none --output_dir none --train_batch_size 1".split()
    command += ["--num_inversion_steps", "2"]  # one more UNet call without gradient takes time and no memory
    args = script.parse_args([*command, "--resolution", str(resolution), *flags])
    models = make_training_models(script, kind, "meta", torch.bfloat16, args)
    networks = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    frozen = [bytes_of(network.parameters()) for name, network in networks.items() if name != "unet"]
    row = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 1).to_pylist()[0]
    drawn = {"mirror": False, "empty": False, "timestep": 999, "seeds": [1, 2, 3]}
    example = {**script.prepare_pair(row, 0.9, drawn, args), "problems": []}
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
        with (
            mock.patch.object(script, "offload_models", live.moved_in),
            mock.patch.object(functional, "group_norm", in_float32(functional.group_norm)),
            mock.patch.object(functional, "layer_norm", in_float32(functional.layer_norm)),
        ):
            for _ in range(2):
                for _ in range(2):  # the second batch is inverted while there are gradients of the first
                    batch = script.collate_pairs([example] * max(args.train_batch_size, args.inversion_batch_size))
                    micro_batch, *_ = script.invert_and_judge(batch, context)
                    loss, _ = script.training_step(micro_batch, context)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    sizes = {name: 0 if args.offload else bytes_of(network.parameters()) for name, network in networks.items()}
    reference = sizes.pop("ref_unet", 0)
    sizes.pop("unet")
    return live.peak, {
        "UNet": bytes_of(models["unet"].parameters()), "reference": reference, "VAE, text": sum(sizes.values()),
        "gradients": bytes_of(parameters),
        "optimiser": bytes_of(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)),
    }  # fmt: skip


def measure(kind, resolution, flags, work_dir):
    """Runs the training script for two steps; its peak and reserved memory in bytes, or the error's last line."""
    pipeline, output_dir = work_dir / kind, work_dir / "out"
    if not (pipeline / "model_index.json").is_file():
        write_pipeline(pipeline, kind, torch.float16)
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [
        sys.executable, "-c", RUN, ROOT, f"train_smpo_{kind}", "--pretrained_model_name_or_path", pipeline,
        "--dataset_name", TINY / "pairs", "--label_column", "label_0", "--gamma", "1", "--output_dir", output_dir,
        "--resolution", resolution if torch.cuda.is_available() else 64, "--max_train_steps", 2,
        "--mixed_precision", "bf16", "--train_batch_size", 1,
        "--gradient_accumulation_steps", 16,  # as many pairs as are inverted at a time
        "--report_to", "none", *flags,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    found = re.search(r"^MEMORY (.*)$", done.stdout, re.M)
    return json.loads(found[1]) if found else [done.stderr.strip().splitlines()[-1], None]


# Runs a training script without what it saves, which may take more memory than training, and prints its memory.
RUN = """
import importlib, json, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
script = importlib.import_module(sys.argv[2])
script.save_final = script.save_checkpoint = lambda *args: None
script.main(script.parse_args(sys.argv[3:]))
if torch.cuda.is_available():
    memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
else:
    memory = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None]
print("MEMORY", json.dumps(memory))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["count", "measure"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "smpo-real-size")
    command = sys.argv[1:] + ["--"]
    own, further_flags = command[: command.index("--")], command[command.index("--") + 1 : -1]
    args = parser.parse_args(own)
    if args.how == "count":
        columns = ["UNet", "reference", "VAE, text", "gradients", "optimiser", "the rest", "peak"]
    else:
        print("A GPU" if torch.cuda.is_available() else "A CPU, at 64 pixels: resident memory", end=", ")
        columns = ["peak", "reserved"]
    print(f"GiB, bf16, {' '.join(further_flags) or 'one pair a micro-batch'}\n")
    print(f"| | pixels | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 2) + "|")
    for name in args.cases:
        kind, resolution, flags = CASES[name]
        if args.how == "count":
            peak, sizes = count(kind, resolution, flags + further_flags)
            numbers = [*sizes.values(), peak - sum(sizes.values()), peak]
        else:
            numbers = measure(kind, resolution, flags + further_flags, args.work_dir)
        cells = [f"{number / GIB:.2f}" if isinstance(number, int) else number or "" for number in numbers]
        print(f"| {name} | {resolution} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
