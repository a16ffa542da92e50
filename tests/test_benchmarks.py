"""The benchmarks count what they say."""

import sys

import benchmark_flops
import benchmark_memory
import benchmark_relabel
import benchmark_training
import pandas as pd
import pytest
import torch
from benchmark_memory import LiveBytes, count, in_float32
from conftest import ROOT
from random_models import make_unet

import train_smpo_sd15


def test_live_bytes_follow_what_is_alive():
    with LiveBytes() as live:
        first = torch.empty(256)
        second = torch.empty(1024, dtype=torch.float16)
        view = second.view(2, 512)
        assert live.now == 1024 + 2048
        del first, second
        assert live.now == 2048 and view.numel() == 1024
        with live.moved_in(torch.nn.Linear(15, 16), device="cpu", offload=True):
            pass
        del view
    assert live.now == 0 and live.peak >= 3072


def test_norms_are_in_fp32_under_autocast_alone():
    norm = in_float32(torch.nn.functional.layer_norm)
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert norm(x, (4,)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x, (4,)).dtype == torch.float32


@pytest.mark.slow
def test_memory_of_a_lora_step():
    """SD1.5 at 64 pixels: the parts have the sizes of their parameters, and the peak lies a little above their sum."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_unet("sd15").parameters())
    offload_models, group_norm = train_smpo_sd15.offload_models, torch.nn.functional.group_norm
    peak, parts = count("sd15", 64, ["--rank", "4", "--gradient_checkpointing"])
    assert train_smpo_sd15.offload_models is offload_models and torch.nn.functional.group_norm is group_norm
    lora = parts["gradients"] // 4  # 2 x 4 layers in each of 16 blocks, 797,184 parameters at rank 4
    assert parameters == 859_520_964 and lora == 797_184
    assert parts["UNet"] == 2 * parameters + 4 * lora and parts["reference"] == 0
    assert parts["optimiser"] == 8 * lora + 4 * 256  # two moments a parameter, a step count a tensor
    assert sum(parts.values()) < peak < sum(parts.values()) + 2**28


def test_the_slow_loop_gives_the_scores_of_the_fast_one(capsys):
    """So that their speeds can be compared. Cosines, after a hundred roundings to fp32, differ by 100 x 2**-24."""
    assert benchmark_relabel.main(["speed", "--num_pairs", "16", "--size", "64", "--batch_size", "8"]) < 1e-5
    assert "| relabel_pickapic.py |" in capsys.readouterr().out


def test_flags_after_two_dashes_reach_the_training_script(monkeypatch, capsys):
    seen = []
    sizes = dict.fromkeys(["UNet", "reference", "VAE, text", "gradients", "optimiser"], 2**30)
    monkeypatch.setattr(benchmark_memory, "count", lambda *arguments: seen.append(arguments) or (6 * 2**30, sizes))
    command = ["count", "--cases", "SD1.5 full, AdamW", "SDXL LoRA", "--", "--train_batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["benchmark_memory.py", *command])
    benchmark_memory.main()
    assert [(kind, flags[-2:]) for kind, _, flags in seen] == [("sd15", command[-2:]), ("sdxl", command[-2:])]
    out = capsys.readouterr().out
    assert "--train_batch_size 8" in out and "| SDXL LoRA | 1024 |" + 6 * " 1.00 |" + " 6.00 |" in out


def test_the_arithmetic_of_the_readme(capsys):
    benchmark_flops.main([])
    printed = capsys.readouterr().out
    assert printed[printed.index("| 204,800 pairs") :] in (ROOT / "tests/benchmarks/README.md").read_text()


def run_training(output_dir, monkeypatch, *flags):
    """Runs the benchmark of training; its rows."""
    for name, value in {"COMPARED_PAIRS": 1, "REPEATS": {"cpu": 1}, "MATRICES": {"cpu": (64, 1)}}.items():
        monkeypatch.setattr(benchmark_training, name, value)
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *map(str, flags), "--output_dir", str(output_dir)])
    benchmark_training.main()
    return pd.read_csv(output_dir / "training.csv")


def test_a_row_without_memory_costs_no_other(tmp_path, monkeypatch):
    def time(run, size, num_pairs, flags=(), released=False):
        if size == 2:
            raise torch.OutOfMemoryError
        return {"pairs/s": 2.0 * size, "UNet forwards a pair": 10.0, "TFLOP/s": 1.0, "GiB": 2.0}

    monkeypatch.setattr(benchmark_training.Run, "time", time)
    monkeypatch.setattr(benchmark_training, "compare_precisions", lambda: (0.0, 1.0))
    command = ["--cases", "tiny-full", "tiny-lora", "--batch_sizes", 1, 2, 4]
    rows = run_training(tmp_path, monkeypatch, *command)
    as_it_is = ["authors' recipe", "script", "script", "script"]
    full = [*as_it_is, "inverted micro-batch by micro-batch", "Diffusion-DPO"]
    assert rows["how"].tolist() == full + as_it_is
    assert rows["GiB"].astype(str).tolist()[:4] == ["2.0", "2.0", "OOM", "2.0"] and rows["ratio"][3] == 4


@pytest.mark.slow
def test_training_speed_of_sdxl(tmp_path, monkeypatch):
    rows = run_training(tmp_path, monkeypatch, "--cases", "tiny-sdxl-lora", "--batch_sizes", 1, 2, "--num_pairs", 2)
    assert rows["how"].tolist() == ["authors' recipe", "script", "script"]


def test_training_speed_is_told_with_what_was_computed(tmp_path, monkeypatch, capsys):
    """Every pair at the timesteps that the script draws: UNet passes and phases of each way to train, by hand."""
    rows = run_training(tmp_path, monkeypatch, "--cases", "tiny-full", "--batch_sizes", 2, "--num_pairs", 2)
    assert "cosine of the gradients 0.9" in capsys.readouterr().out
    released, script, one_by_one, forward = rows.to_dict("records")
    run = benchmark_training.Run("tiny-full", torch.float32)
    timesteps = next(run.batches(run.parse(2, []), 2))["timesteps"]
    moves = (9 * (timesteps + 1) + 999) // 1000
    levels = train_smpo_sd15.released_timesteps(next(run.batches(run.parse(1, []), 1))["timesteps"], 5, 1000)
    levels = (levels.diff() > 0).sum(dim=1)
    assert (
        script["UNet forwards a pair"] == one_by_one["UNet forwards a pair"] == 2 * (moves + 1 + 1 + 3).float().mean()
    )
    assert script["UNet calls a pair"] * 2 == moves.max() + 1 + 1 + 1  # inversion, correction, reference, policy
    assert forward["UNet forwards a pair"] == 2 * (1 + 3)
    assert released["UNet forwards a pair"] == 2 * (2 * levels + 1 + 3).float().mean()
    assert released["UNet calls a pair"] == (2 * levels + 2).float().mean()
    for row in (released, script, one_by_one, forward):
        shares = [row[phase] for phase in benchmark_training.PHASES]
        assert 0.5 < sum(shares) < 1.0001 and all(share > 0 for share in shares[:3] + shares[4:])
        assert (row["inversion"] > 0) == (row is not forward)
    throughputs = [row["pairs/s"] * row["UNet forwards a pair"] for row in (script, released)]
    assert script["ratio"] == pytest.approx(throughputs[0] / throughputs[1], rel=1e-9)
