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
"""Speed of the training scripts beside the authors' recipe, on random weights of the published configurations.

    python tests/benchmarks/benchmark_training.py --output_dir FOLDER                       # on a GPU: all of it, unattended
    python tests/benchmarks/benchmark_training.py --cases tiny-full small-full --batch_sizes 1 4 16 --output_dir FOLDER   # CPU

For every case and micro-batch size it runs the script's own data loading, `prepare_micro_batches`, `training_step`, backward
pass and optimiser, and writes a table to FOLDER/training.md, and to training.csv, after every row. The other rows are the same
work done otherwise, the authors' recipe first and the rest when all cases have been measured as they are:

* the authors' recipe: one pair at a time on a fixed grid of levels cut at t, two UNet calls a level, weights in fp32 that each call
  rounds again, nothing compiled, a number read back after every pair (see `released_inversion.py`);
* the script with one of its ideas taken away, to see what each is worth;
* Diffusion-DPO, which inverts nothing.

pairs/s is at 128 pairs a GPU and optimiser step, the published number: the time of a pair is measured on fewer, that of the
optimiser's step by itself. The ratio to the authors' recipe is at equal UNet calls: of pairs/s times UNet forward passes a pair,
where a policy pass with its gradient counts as three. The share of the matrix rate is of what a large product in the same
precision reaches here; TFLOP are counted by PyTorch, recomputed ones included.
"""

import argparse
import copy
import csv
import gc
import importlib
import itertools
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from benchmark_relabel import make_photo
from random_models import TINY, make_text_encoders, make_unet, make_vae
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTokenizer

import diffusers


ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from released_inversion import released_inversion  # noqa: E402


PAIRS_A_STEP = 128  # of one GPU in the published recipe
NUM_PHOTOS = 16
PHASES = ["data", "VAE", "text", "inversion", "reference", "policy", "optimiser"]
FULL, LORA = [], ["--rank", "16"]
# kind of network, pixels, levels of the authors' grid, flags
CASES = {
    "sd15-full": ("sd15", 512, 5, FULL),
    "sd15-lora": ("sd15", 512, 5, LORA),
    "sdxl-full": ("sdxl", 1024, 10, ["--gradient_checkpointing"]),
    "sdxl-lora": ("sdxl", 1024, 10, [*LORA, "--gradient_checkpointing", "--optimizer", "adamw"]),
    "tiny-full": ("tiny-sd15", 64, 5, FULL),
    "tiny-lora": ("tiny-sd15", 64, 5, LORA),
    "tiny-sdxl-lora": ("tiny-sdxl", 64, 10, [*LORA, "--gradient_checkpointing", "--optimizer", "adamw"]),
    "small-full": ("small-sd15", 128, 5, FULL),  # SD1.5 with a quarter of its width
}
# One idea less than the script, or one more: the micro-batch, the smallest of the list or the largest that fits, and what differs.
VARIANTS = {
    "inverted micro-batch by micro-batch": ("smallest", {"flags": ["--inversion_batch_size", "1"]}),
    "weights rounded at every call": ("smallest", {"round_once": False}),
    "no channels_last": ("largest", {"channels_last": False}),
    "AdamW parameter by parameter": ("largest", {"fused": False}),
    "Diffusion-DPO": ("largest", {"flags": ["--noising", "forward"]}),
    "compiled blocks": ("largest", {"flags": ["--compile"]}),  # the last: blocks stay compiled
}
HALF_PRECISION_ALONE = ["weights rounded at every call", "no channels_last"]
COMPILE_SECONDS = 150  # at most, by a guess; so much before the limit no compilation starts
REPEATS = {"cuda": 1, "cpu": 3}  # the median is taken, as CPUs have other things to do


@dataclass
class Clock:
    """Seconds spent in each phase; a phase within another one is not counted twice."""

    device: torch.device
    seconds: dict = field(default_factory=lambda: dict.fromkeys([*PHASES, "rest"], 0.0))
    phases: list = field(default_factory=lambda: ["rest"])
    since: float = field(default_factory=time.perf_counter)

    def switch(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phases[-1]] += now - self.since
        self.since = now

    def timed(self, phase, function):
        def wrapper(*args, **kwargs):
            self.switch()
            self.phases.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.phases.pop()

        return wrapper


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product."""
    size, count = (8192, 20) if device.type == "cuda" else (1536, 4)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for repeats in (3, count):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronise(device)
    return 2 * size**3 * count / (time.perf_counter() - start)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_photos(resolution):
    """Pairs of JPEGs of the size that they have in Pick-a-Pic, no larger than needed for the miniatures."""
    rng = np.random.default_rng(0)
    photos = [make_photo(min(1024, resolution * 3 // 2), rng) for _ in range(NUM_PHOTOS)]
    return datasets.Dataset.from_dict(
        {
            "jpg_0": photos,
            "jpg_1": photos[::-1],
            "caption": [f"a large red circle {i}" for i in range(NUM_PHOTOS)],
        }
    )


class Run:
    """The models of a case, and ways to take steps with them."""

    def __init__(self, name, device, dtype):
        kind, self.resolution, self.num_levels, self.flags = CASES[name]
        self.script = importlib.import_module("train_smpo_sdxl" if "sdxl" in kind else "train_smpo_sd15")
        self.device, self.dtype = device, dtype
        self.args = self.parse(1, [])
        torch.manual_seed(0)
        with torch.device(device):
            unet = make_unet(kind).to(device)  # a trained one comes to the CPU all the same
        self.models = {"unet": unet.train(), "ref_unet": None}
        if self.args.rank is None:
            self.models["ref_unet"] = self.rounded(copy.deepcopy(unet)).requires_grad_(False)
        else:
            unet.to(dtype)
            self.script.add_lora(unet, self.args)
        if self.args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        parts = dict(zip(self.script.TEXT_ENCODERS, make_text_encoders(kind)), vae=make_vae(kind))
        for part, network in parts.items():
            part_dtype = torch.float32 if part == "vae" and network.config.force_upcast else dtype
            self.models[part] = network.requires_grad_(False).to(device, part_dtype)
        tokenizer = CLIPTokenizer.from_pretrained(TINY / "sd15" / "tokenizer")
        self.models.update(dict.fromkeys(self.script.TOKENIZERS, tokenizer))
        self.pairs = make_photos(self.resolution)
        self.alpha_bar = self.script.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ).alphas_cumprod.to(device)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def rounded(self, unet):
        """As `load_reference` rounds it."""
        for module in unet.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.to(self.dtype)
        return unet

    def parse(self, batch_size, flags):
        command = ["--pretrained_model_name_or_path", "none", "--dataset_name", "none", "--output_dir", "none"]
        command += ["--resolution", str(self.resolution), "--train_batch_size", str(batch_size), *self.flags, *flags]
        args = self.script.parse_args(command)
        args.prediction_type = "epsilon"
        if args.dataloader_num_workers is None:
            args.dataloader_num_workers = self.script.MAX_WORKERS if self.device.type == "cuda" else 0
        return args

    def batches(self, args, num_pairs):
        """Endless batches of the script's loader, steps of `num_pairs` pairs; every pair has new timesteps in every step."""
        args.gradient_accumulation_steps = num_pairs // args.train_batch_size
        rows = np.arange(max(num_pairs, len(self.pairs)))
        pairs = self.pairs.select(rows % len(self.pairs))
        dataset = self.script.PairDataset(pairs, rows, np.full(len(rows), 0.7, np.float32), 1000, args)
        sampler = self.script.PairSampler(len(rows), args.train_batch_size, 1, 0, seed=0, start=0)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=self.script.batches_of_steps(sampler, dataset, args),
            collate_fn=self.script.collate_pairs,
            num_workers=args.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def released_step(self, batch):
        """Loss of one pair by the authors' recipe."""
        script, models, alpha_bar, args = self.script, self.models, self.alpha_bar, self.args
        x_0 = script.encode_images(batch["pixel_values"], models["vae"], 2, [0, 1])
        prompt_cond = script.encode_prompts(batch["captions"], models)
        cond = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in prompt_cond.items()}
        cond.update({key: value.to(self.device) for key, value in batch["image_cond"].items()})
        t = batch["timesteps"].repeat(2).to(self.device)

        def eps(unet, x, timesteps, rows_cond):
            return script.predict_eps(unet, x, timesteps, rows_cond, alpha_bar, self.autocast, args)

        def policy_eps(x, timesteps, rows):
            return eps(models["unet"], x, timesteps, {key: value[rows] for key, value in cond.items()})

        x_t = released_inversion(policy_eps, x_0, t, alpha_bar, self.num_levels)
        tau = script.implied_noise(x_0, x_t, alpha_bar[t])
        with torch.no_grad(), script.reference_of(models["unet"], models["ref_unet"], self.device, args) as reference:
            ref_errors = script.squared_errors(eps(reference, x_t, t, cond), tau)
        model_errors = script.squared_errors(eps(models["unet"], x_t, t, cond), tau)
        soft_label_0 = batch["soft_label_0"].to(self.device)
        return script.smpo_loss(model_errors, ref_errors, soft_label_0, args.beta_dpo, args.gamma)[0]

    def time(self, batch_size, num_pairs, flags=(), released=False, channels_last=True, round_once=True, fused=True):
        """Measures one way to train; a dict of numbers."""
        script, args = self.script, self.parse(batch_size, list(flags))
        if released:
            args.inversion_batch_size = 1
        memory_format = torch.channels_last if channels_last and not released else torch.contiguous_format
        if self.dtype != torch.float32:
            for network in filter(None, (self.models[part] for part in ("unet", "ref_unet", "vae"))):
                network.to(memory_format=memory_format)
        unet, parameters = self.models["unet"], [p for p in self.models["unet"].parameters() if p.requires_grad]
        optimizer = script.make_optimizer(parameters, 1e-9, args)
        if isinstance(optimizer, torch.optim.AdamW) and (released or not fused):
            optimizer = torch.optim.AdamW(parameters, lr=1e-9, foreach=False)
        calls_behind = None if round_once else lambda calls: 0  # as under FSDP, where nothing is kept between calls
        batches = self.batches(args, num_pairs)

        def micro_steps(pairs, clock=None):
            timed = clock.timed if clock else lambda phase, function: function
            fetch, backward = timed("data", next), timed("policy", torch.Tensor.backward)
            while pairs > 0:
                batch = fetch(batches)
                if released:
                    loss = timed("policy", self.released_step)(batch)
                    backward(loss / PAIRS_A_STEP)
                    float(loss.detach())
                else:
                    prepare = timed("reference", script.prepare_micro_batches)
                    for micro_batch in prepare(batch, self.models, self.alpha_bar, self.autocast, args, calls_behind):
                        policy = timed("policy", script.training_step)
                        loss, _ = policy(micro_batch, unet, self.alpha_bar, self.autocast, args)
                        backward(loss / PAIRS_A_STEP)
                pairs -= len(batch["captions"])

        def optimiser_step():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # so that the step can be timed alone

        calls, images, count = count_images(script)
        with FlopCounterMode(display=False) as flops, mock.patch.object(script, "predict_noise", count):
            micro_steps(num_pairs)
        optimiser_step()
        if args.compile:
            torch._dynamo.config.cache_size_limit = 64  # as the script does
            for network in filter(None, (unet, self.models["ref_unet"])):
                network.compile_repeated_blocks()
            micro_steps(num_pairs)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        micro_steps(num_pairs)  # once more: kernels are chosen, memory is there
        pair_seconds = self.median_seconds(lambda: micro_steps(num_pairs)) / num_pairs
        optimiser_seconds = self.median_seconds(optimiser_step)
        clock = Clock(self.device)
        patches = {"encode_images": "VAE", "encode_prompts": "text", "invert": "inversion"}
        if released:
            patches.pop("invert")
        originals = {name: getattr(script, name) for name in patches}
        timed = {name: clock.timed(phase, originals[name]) for name, phase in patches.items()}
        released_timed = clock.timed("inversion", released_inversion)
        with mock.patch.multiple(script, **timed), mock.patch(f"{__name__}.released_inversion", released_timed):
            micro_steps(num_pairs, clock)
            clock.timed("optimiser", optimiser_step)()
        seconds = clock.seconds
        seconds["optimiser"] *= num_pairs / PAIRS_A_STEP
        forwards = images["without gradient"] + 3 * images["with gradient"]
        pairs_per_second = PAIRS_A_STEP / (PAIRS_A_STEP * pair_seconds + optimiser_seconds)
        return {
            "pairs/s": pairs_per_second,
            "UNet forwards a pair": forwards / num_pairs,
            "UNet calls a pair": calls["all"] / num_pairs,
            "TFLOP/s": flops.get_total_flops() / num_pairs * pairs_per_second / 1e12,
            "GiB": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None,
            **{phase: seconds[phase] / sum(seconds.values()) for phase in PHASES},
        }

    def median_seconds(self, function):
        seconds = []
        for _ in range(REPEATS[self.device.type]):
            synchronise(self.device)
            start = time.perf_counter()
            function()
            synchronise(self.device)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2]


def count_images(script):
    """Counters of UNet calls and of the images in them, and a `predict_noise` that counts."""
    calls, images, predict_noise = {"all": 0}, {"with gradient": 0, "without gradient": 0}, script.predict_noise

    def count(unet, x_t, t, cond):
        calls["all"] += 1
        images["with gradient" if torch.is_grad_enabled() else "without gradient"] += len(x_t)
        return predict_noise(unet, x_t, t, cond)

    return calls, images, count


def compare_precisions(device):
    """How far loss and gradient in bf16, as trained, are from one pair at a time in fp32, on the tiny model that really learned.

    The policy is the reference and some noise. Returns the relative difference of the loss, and the cosine of the gradients.
    """
    run = Run("tiny-full", device, torch.float32)
    models, results = run.models, []
    with torch.no_grad():
        for parameter in models["unet"].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for dtype, inversion_batch_size in ((torch.float32, 1), (torch.bfloat16, 16)):
        args = run.parse(1, ["--inversion_batch_size", str(inversion_batch_size), "--beta_dpo", "200"])
        if dtype != torch.float32:
            run.dtype = dtype
            run.rounded(models["ref_unet"])
            for part in ("vae", "text_encoder"):
                models[part].to(dtype)
            for part in ("unet", "ref_unet", "vae"):
                models[part].to(memory_format=torch.channels_last)
        batches, total, num_pairs = run.batches(args, 16), 0.0, 0
        while num_pairs < 16:
            batch = next(batches)
            num_pairs += len(batch["captions"])
            for micro_batch in run.script.prepare_micro_batches(batch, models, run.alpha_bar, run.autocast, args):
                loss, _ = run.script.training_step(micro_batch, models["unet"], run.alpha_bar, run.autocast, args)
                (loss / 16).backward()
                total += float(loss.detach()) / 16
        results.append((total, torch.cat([p.grad.flatten().double() for p in models["unet"].parameters()])))
        models["unet"].zero_grad()
    (loss, gradient), (half_loss, half_gradient) = results
    cosine = torch.nn.functional.cosine_similarity(gradient, half_gradient, dim=0)
    return abs(half_loss - loss) / loss, float(cosine)


COLUMNS = ["case", "how", "pairs a micro-batch", "pairs/s", "ratio", "UNet forwards a pair", "UNet calls a pair"]
COLUMNS += ["TFLOP/s", "of the matrix rate", "GiB", *PHASES]


def write_tables(rows, header, folder):
    """All rows so far, as Markdown and as CSV."""

    def text(column, value):
        if value is None or isinstance(value, str):
            return value or ""
        if column in ("of the matrix rate", *PHASES):
            return f"{value:.0%}"
        return str(value) if isinstance(value, int) else f"{value:.2f}"

    lines = [header, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(text(column, row.get(column)) for column in COLUMNS)} |" for row in rows]
    (folder / "training.md").write_text("\n".join(lines) + "\n")
    with open(folder / "training.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="Default: the published sizes on a GPU.")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=int, help="Pairs a micro-batch. Default: 1 4 8 16, 32 for SD1.5."
    )
    parser.add_argument("--num_pairs", type=int, help="Pairs that are timed. Default: 32 for SD1.5, 16 for SDXL.")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="Default: bf16 on a GPU, fp32 on a CPU.")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--time_limit", type=float, default=540, help="Seconds; rows that would start later are left out."
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    PartialState()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rate = matrix_rate(device, dtype)
    loss_difference, cosine = compare_precisions(device)
    header = (
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'};"
        f" torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__};"
        f" {precision} matrix products reach {rate / 1e12:.3g} TFLOP/s. bf16, as trained, against fp32, one"
        f" pair at a time, on the tiny trained model: loss off by {loss_difference:.1e}, cosine of the gradients {cosine:.4f}."
    )
    print(header, flush=True)
    rows, released_rates, largest = [], {}, {}

    def measure(run, case, how, size, num_pairs, options):
        """Adds a row, with the reason in the place of the memory if there is none."""
        row = {"case": case, "how": how, "pairs a micro-batch": size}
        try:
            numbers = run.time(size, num_pairs, **options)
            throughput = numbers["pairs/s"] * numbers["UNet forwards a pair"]
            if "released" in options:
                released_rates[case] = throughput
            row |= {**numbers, "ratio": throughput / released_rates[case] if case in released_rates else None}
            row["of the matrix rate"] = numbers["TFLOP/s"] * 1e12 / rate
            if how == "script":
                largest[case] = size
        except torch.OutOfMemoryError:
            row["GiB"] = "OOM"
        except Exception as error:  # of a compiler, say: the other rows are worth having
            row["GiB"] = f"{type(error).__name__}: {error}".splitlines()[0][:100].replace("|", "/")
        run.models["unet"].zero_grad()
        rows.append(row)
        lines = write_tables(rows, header, args.output_dir)
        print("\n".join(lines[2:4] if len(rows) == 1 else []), lines[-1], sep="\n", flush=True)

    cases = args.cases or ["sd15-full", "sdxl-full", "sd15-lora", "sdxl-lora"]
    for variants, case in itertools.product((False, True), cases):
        sdxl = "sdxl" in case
        sizes = args.batch_sizes or ([1, 4, 8, 16] if sdxl else [1, 4, 8, 16, 32])
        num_pairs = max(args.num_pairs or (16 if sdxl else 32), *sizes)
        plan = [("authors' recipe", 1, max(num_pairs // 4, 4), {"released": True})]
        plan += [("script", size, num_pairs, {}) for size in sizes]
        if variants:
            places = {"smallest": sizes[0], "largest": largest.get(case, sizes[0])}
            plan = [(name, places[VARIANTS[name][0]], num_pairs, VARIANTS[name][1]) for name in args.variants]
            plan = [row for row in plan if applies(case, row[0], dtype)]
        run = None
        for how, size, pairs, options in plan:
            left = args.time_limit - (time.perf_counter() - start)
            if left < (COMPILE_SECONDS if how == "compiled blocks" else 0):
                print(f"{case}, {how}: left out, --time_limit is near", flush=True)
                continue
            run = run or Run(case, device, dtype)
            measure(run, case, how, size, pairs, options)
        del run
        gc.collect()  # compiled blocks hold themselves
        if device.type == "cuda":
            torch.cuda.empty_cache()


def applies(case, how, dtype):
    """Whether a row of `VARIANTS` differs from the script's in a case."""
    if how == "AdamW parameter by parameter" and case == "sdxl-full":
        return False  # it trains with Adafactor
    return not case.endswith("lora") and (dtype != torch.float32 or how not in HALF_PRECISION_ALONE)


if __name__ == "__main__":
    main()
