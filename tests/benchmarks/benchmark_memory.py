# coding=utf-8
# Copyright 2026 The SmPO-Diffusion reference implementation authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Memory of training with the published configurations of SD1.5 and SDXL, counted on any machine or measured on a GPU.

    python tests/benchmarks/benchmark_memory.py count [--cases CASE ...] [-- FLAGS OF THE TRAINING SCRIPT]
    python tests/benchmarks/benchmark_memory.py measure [--work_dir FOLDER] [-- FLAGS OF THE TRAINING SCRIPT]

`count` needs no memory and no GPU: the networks hold fake tensors, which have shapes and no data, and the script's own
`prepare_micro_batches`, `training_step`, backward pass, clipping and optimiser run on them twice, while every storage that is alive is added up. Norms
run in fp32 as CUDA's autocast has them. What it leaves out: the CUDA context, the work space of cuDNN and the allocator's
rounding.

`measure` runs the training scripts for two steps on random weights (written once, in fp16) and the tiny pairs. On a GPU it
prints `torch.cuda.max_memory_allocated`; on a CPU, where the cases are run at 64 pixels, the peak resident memory. Both print
Markdown.
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

import torch
from random_models import TINY, make_text_encoders, make_unet, make_vae, write_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CLIPTokenizer


ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

GIB = 2**30
# name: kind, resolution, what it shall fit in (GiB, or None), flags of the training script
CASES = {
    "SD1.5 LoRA": ("sd15", 512, 8, ["--rank", "16", "--gradient_checkpointing"]),
    "SD1.5 LoRA, no checkpointing": ("sd15", 512, None, ["--rank", "16"]),
    "SD1.5 full, AdamW": ("sd15", 512, None, ["--gradient_checkpointing"]),
    "SD1.5 full, AdamW, no checkpointing": ("sd15", 512, None, []),
    "SD1.5 full, Adafactor": ("sd15", 512, None, ["--gradient_checkpointing", "--optimizer", "adafactor"]),
    "SDXL LoRA": ("sdxl", 1024, 16, ["--rank", "16", "--gradient_checkpointing", "--optimizer", "adamw"]),
    "SDXL LoRA, offload": (
        "sdxl", 1024, None, ["--rank", "16", "--gradient_checkpointing", "--optimizer", "adamw", "--offload"]
    ),
    "SDXL full, Adafactor": ("sdxl", 1024, 48, ["--gradient_checkpointing"]),
    "SDXL full, Adafactor, offload": ("sdxl", 1024, None, ["--gradient_checkpointing", "--offload"]),
}  # fmt: skip


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


def make_fake(network):
    """Puts fake tensors in the place of a network's parameters and buffers, which are on the meta device."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def count(kind, resolution, flags):
    """Peak bytes of an optimiser step of two batches, of a micro-batch of one pair each, in bf16, and the bytes of its parts."""
    script = importlib.import_module(f"train_smpo_{kind}")
    command = ["--pretrained_model_name_or_path", "none", "--dataset_name", "none", "--output_dir", "none"]
    command += ["--train_batch_size", "1"]
    command += ["--num_inversion_steps", "2"]  # one more UNet call without gradient takes time and no memory
    args = script.parse_args([*command, "--resolution", str(resolution), *flags])
    args.prediction_type = "epsilon"
    bf16, live = torch.bfloat16, LiveBytes()
    with torch.device("meta"):
        unet = make_unet(kind).to(bf16 if args.rank else torch.float32)
        ref_unet = None if args.rank else make_unet(kind).to(bf16)
        vae = make_vae(kind).to(torch.float32 if kind == "sdxl" else bf16)
        text_encoders = [text_encoder.to(bf16) for text_encoder in make_text_encoders(kind)]
    if args.rank:
        script.add_lora(unet, args)
    frozen = [network.requires_grad_(False) for network in [vae, *text_encoders, ref_unet] if network is not None]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with live:
        with fake:
            for network in [unet, *frozen]:
                make_fake(network)
        if args.offload:
            live.now -= sum(bytes_of(network.parameters()) for network in frozen)
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        tokenizer = CLIPTokenizer.from_pretrained(TINY / "sd15" / "tokenizer")
        models = {"unet": unet, "ref_unet": ref_unet, "vae": vae}
        models.update(
            {part: tokenizer for part in script.TOKENIZERS}, **dict(zip(script.TEXT_ENCODERS, text_encoders))
        )
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = script.make_optimizer(parameters, 1e-5, args)
        pixels = torch.zeros(3, resolution, resolution, dtype=torch.uint8)
        example = {
            "pixel_values": [pixels] * 2, "caption": "a red circle", "soft_label_0": 0.9, "timestep": 999,
            "seeds": [1, 2, 3], "problems": [],
            "image_cond": [script.image_conditions((resolution,) * 2, (0, 0), resolution)] * 2,
        }  # fmt: skip
        alpha_bar = torch.linspace(0.999, 0.005, 1000)

        def autocast():
            return torch.autocast("cpu", bf16)

        live.peak = 0
        functional = torch.nn.functional
        with (
            mock.patch.object(script, "offload_models", live.moved_in),
            mock.patch.object(functional, "group_norm", in_float32(functional.group_norm)),
            mock.patch.object(functional, "layer_norm", in_float32(functional.layer_norm)),
        ):
            for _ in range(2):
                for _ in range(2):  # the second batch is inverted while there are gradients of the first
                    batch = script.collate_pairs([example] * max(args.train_batch_size, args.inversion_batch_size))
                    micro_batch, *_ = script.prepare_micro_batches(batch, models, alpha_bar, autocast, args)
                    loss, _ = script.training_step(micro_batch, unet, alpha_bar, autocast, args)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    parts = {
        "UNet": bytes_of(unet.parameters()),
        "reference": 0 if ref_unet is None or args.offload else bytes_of(ref_unet.parameters()),
        "VAE, text": 0 if args.offload else sum(bytes_of(m.parameters()) for m in [vae, *text_encoders]),
        "gradients": bytes_of(parameters),
        "optimiser": bytes_of(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)),
    }
    return live.peak, parts


def measure(kind, resolution, flags, work_dir, further_flags):
    """Runs the training script for two steps; its peak memory in bytes."""
    pipeline, output_dir = work_dir / kind, work_dir / "out"
    if not (pipeline / "model_index.json").is_file():
        write_pipeline(pipeline, kind, torch.float16)
    shutil.rmtree(output_dir, ignore_errors=True)
    cuda = torch.cuda.is_available()
    command = [
        sys.executable, "-c", RUN, str(ROOT), f"train_smpo_{kind}", "--pretrained_model_name_or_path", pipeline,
        "--dataset_name", TINY / "pairs", "--label_column", "label_0", "--gamma", "1", "--output_dir", output_dir,
        "--resolution", resolution if cuda else 64, "--max_train_steps", 2, "--mixed_precision", "bf16",
        "--train_batch_size", 1, "--gradient_accumulation_steps", 16,  # as many pairs as are inverted at a time
        "--report_to", "none", *flags, *further_flags,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    return json.loads(re.search(r"^MEMORY (.*)$", done.stdout, re.M).group(1)), None


# Runs a training script without its final save, which may take more memory than training, and prints its memory.
RUN = """
import importlib, json, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
script = importlib.import_module(sys.argv[2])
script.save_final = lambda *args: None
script.main(script.parse_args(sys.argv[3:]))
cuda = torch.cuda.is_available()
print("MEMORY", json.dumps(
    {"peak": torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
     "reserved": torch.cuda.max_memory_reserved() if cuda else None}
))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["count", "measure"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "smpo-real-size")
    command = sys.argv[1:] + ["--"]
    own, further_flags = command[: command.index("--")], command[command.index("--") + 1 : -1]
    args = parser.parse_args(own)
    title = f"GiB, bf16, {' '.join(further_flags) or 'one pair a micro-batch'}"
    if args.how == "count":
        parts = ["UNet", "reference", "VAE, text", "gradients", "optimiser"]
        print(f"{title}\n\n| | pixels | {' | '.join(parts)} | the rest | peak | has to fit in |")
        print("|---" * (len(parts) + 5) + "|")
    else:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU, at 64 pixels: resident memory"
        print(f"{title}, on {where}\n\n| | pixels | peak | reserved |\n|---|---|---|---|")
    for name in args.cases:
        kind, resolution, target, flags = CASES[name]
        if args.how == "count":
            peak, sizes = count(kind, resolution, flags + further_flags)
            columns = [*(sizes[part] for part in parts), peak - sum(sizes.values()), peak]
            columns = [f"{column / GIB:.2f}" for column in columns] + [str(target or "")]
        else:
            memory, error = measure(kind, resolution, flags, args.work_dir, further_flags)
            columns = [error, ""] if error else [f"{memory[key] / GIB:.2f}" if memory[key] else "" for key in memory]
        print(f"| {name} | {resolution} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
