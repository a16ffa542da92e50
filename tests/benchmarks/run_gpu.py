# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Everything that a GPU decides, unattended: `make gpu OUT=FOLDER`, or with TINY=1 in miniature, on a CPU too.

    python tests/benchmarks/run_gpu.py FOLDER [--tiny]

Each piece is a process that ends within nine minutes; a file of FOLDER says what it printed and how it ended. Started
again with the same folder it goes on with the pieces that have not ended well. Nothing is fetched. It needs
requirements.txt and tests/requirements.txt, or as much as there is: Python 3.12 and torch 2.11 will do.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parent.parent.parent
PIECE_SECONDS = 530
PACKAGES = "torch diffusers transformers accelerate peft datasets bitsandbytes".split()
TESTS = ["starts and full", "starts and lora", "memory", "not starts and not memory"]
ENDED_WELL = "ended with 0\n"


def pieces(tiny, folder):
    """`{name: command}`, what matters most first."""
    benchmarks, ablation = Path("tests/benchmarks"), "tests/ablation/run_ablation.py"
    pytest = ["-m", "pytest", "tests/test_gpu.py", "-n", "0", "-m", "gpu", "-k"]
    commands = {f"tests {words}": [*pytest, words] for words in TESTS}
    for case in ["tiny-full"] if tiny else ["sd15-full", "sdxl-lora", "sdxl-full", "sd15-lora"]:
        few = "--batch_sizes 1 2 --num_pairs 2".split() if tiny else []
        commands[f"speed {case}"] = [benchmarks / "benchmark_training.py", "--cases", case, *few]
    flags = ("--num_pairs 32 --size 64" if tiny else "--model clip-h --size 768 --num_pairs 4096").split()
    commands["labelling"] = [benchmarks / "benchmark_relabel.py", "speed", *flags]
    for case in ["tiny-full"] if tiny else ["sd15-full", "sd15-lora", "sdxl-lora"]:
        flags = ["--num_pairs", "8"] if tiny else []
        commands[f"ideas {case}"] = [benchmarks / "benchmark_ideas.py", case, *flags]
    if not tiny:
        base_model = Path(tempfile.gettempdir()) / "smpo-ablation-base.pt"
        flags = ["calm", "--scale", "gpu", "--base_model", base_model, "--results", folder / "ablation"]
        for part in range(1, 5):
            commands[f"ablation {part}"] = [ablation, *flags, "--time_limit", "420"]
    return {name: [sys.executable, *map(str, command)] for name, command in commands.items()}


def machine():
    """Card, versions and time, as a line."""
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    parts = [card, *(f"{name} {versions.get(name, 'missing')}" for name in PACKAGES)]
    return ", ".join([*parts, f"Python {platform.python_version()}", time.strftime("%Y-%m-%d %H:%M")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="In miniature.")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **({"TINY": "1"} if args.tiny else {}),
    }
    options, ends = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "timeout": PIECE_SECONDS}, []
    for name, command in pieces(args.tiny, args.folder.resolve()).items():
        path, start = args.folder / f"{name}.txt", time.monotonic()
        if path.exists() and path.read_text(errors="replace").endswith(ENDED_WELL):
            continue
        with path.open("w") as log:
            print(machine(), end="\n\n", file=log, flush=True)
            try:
                status = subprocess.run(command, stdout=log, **options).returncode
            except subprocess.TimeoutExpired:
                status = "a timeout"
            end = f"after {time.monotonic() - start:.0f} s ended with {status}\n"
            log.write(f"\n{end}")
        print(f"{name}: {end}", end="", flush=True)
        ends.append(end)
    sys.exit(not all(end.endswith(ENDED_WELL) for end in ends))


if __name__ == "__main__":
    main()
