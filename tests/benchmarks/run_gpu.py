# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Everything that a GPU decides, unattended: `make gpu OUT=FOLDER`, or with TINY=1 in miniature, on a CPU too.

    python tests/benchmarks/run_gpu.py FOLDER [--tiny] [--time_limit SECONDS] [--only PIECE ...]

Each piece is a process that ends within nine minutes. FOLDER/gpu.json holds how each ended and what it printed,
FOLDER/gpu.md the same to read. Started again with the same gpu.json it goes on with the pieces that are not there; one
that failed is there, and runs again if it is asked for with --only. Nothing is fetched. It needs requirements.txt and
tests/requirements.txt, or as much as there is: Python 3.12 and torch 2.11 will do.
"""

import argparse
import importlib.metadata
import json
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
KEPT = 20_000  # characters of a piece's output
TESTS = ["starts and full", "starts and lora", "memory", "not starts and not memory"]


def pieces(tiny, folder):
    """`{name: command}`, what matters most first."""
    benchmarks, ablation = Path("tests/benchmarks"), "tests/ablation/run_ablation.py"
    pytest = ["-m", "pytest", "tests/test_gpu.py", "-n", "0", "-m", "gpu", "-k"]
    commands = {f"tests: {words}": [*pytest, words] for words in TESTS}
    for case in ["tiny-full"] if tiny else ["sd15-full", "sdxl-lora", "sdxl-full", "sd15-lora"]:
        few = "--batch_sizes 1 2 --num_pairs 2".split() if tiny else []
        commands[f"speed: {case}"] = [benchmarks / "benchmark_training.py", "--cases", case, *few]
    flags = ("--num_pairs 32 --size 64" if tiny else "--model clip-h --size 768 --num_pairs 4096").split()
    commands["labelling"] = [benchmarks / "benchmark_relabel.py", "speed", *flags]
    for case in ["tiny-full"] if tiny else ["sd15-full", "sd15-lora", "sdxl-lora"]:
        flags = ["--num_pairs", "8"] if tiny else []
        commands[f"ideas: {case}"] = [benchmarks / "benchmark_ideas.py", case, *flags]
    if not tiny:
        base_model = Path(tempfile.gettempdir()) / "smpo-ablation-base.pt"
        flags = ["calm", "--scale", "gpu", "--base_model", base_model, "--results", folder / "ablation"]
        for part in range(1, 5):
            commands[f"ablation: {part}"] = [ablation, *flags, "--time_limit", "420"]
    return {name: [sys.executable, *map(str, command)] for name, command in commands.items()}


def machine():
    """Card, versions and time, as a line."""
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    parts = [card, *(f"{name} {versions.get(name, 'missing')}" for name in PACKAGES)]
    return ", ".join([*parts, f"Python {platform.python_version()}", time.strftime("%Y-%m-%d %H:%M")])


def run_piece(command, tiny):
    """How a process ended, how long it took, and the end of what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **({"TINY": "1"} if tiny else {})}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=PIECE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            status = "timeout"
        log.seek(0)
        output = log.read()[-KEPT:]
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "machine": machine(), "output": output}


def write(results, folder):
    (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    lines = ["| | ended with | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {result['status']} | {result['seconds']} |" for name, result in results.items()]
    for name, result in results.items():
        lines += ["", f"## {name}", "", result["machine"], "", "```", result["output"].strip(), "```"]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="In miniature.")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="Seconds; no piece starts later.")
    parser.add_argument("--only", nargs="+", help="Run these pieces, whether they are done or not.")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    state, start = args.folder / "gpu.json", time.monotonic()
    results = json.loads(state.read_text()) if state.exists() else {}
    for name, command in pieces(args.tiny, args.folder.resolve()).items():
        due = name in args.only if args.only else name not in results
        if not due or time.monotonic() - start > args.time_limit:
            continue
        results[name] = run_piece(command, args.tiny)
        write(results, args.folder)
        print(f"{name}: ended with {results[name]['status']} after {results[name]['seconds']} s", flush=True)
    sys.exit(any(result["status"] != 0 for result in results.values()))


if __name__ == "__main__":
    main()
