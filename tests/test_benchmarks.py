"""The benchmarks count what they say."""

import benchmark_flops
import benchmark_relabel
import benchmark_training
import pytest
import torch
from benchmark_memory import LiveBytes, count
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


@pytest.mark.slow
def test_memory_of_a_lora_step():
    """SD1.5 at 64 pixels: the parts have the sizes of their parameters, and the peak lies a little above their sum."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_unet("sd15").parameters())
    parts = count("sd15", 64, ["--rank", "4", "--gradient_checkpointing", "--inversion_batch_size", "2"])
    lora = parts["gradients"] // 4  # 2 x 4 layers in each of 16 blocks, 797,184 parameters at rank 4
    assert parameters == 859_520_964 and lora == 797_184
    assert parts["weights"] == 2 * parameters + 4 * lora and parts["reference"] == 0
    assert parts["optimiser"] == 8 * lora + 4 * 256  # two moments a parameter, a step count a tensor
    assert 0 < parts["the rest"] < 2**28


def test_the_slow_loop_gives_the_scores_of_the_fast_one(capsys):
    """So that their speeds can be compared. Cosines, after a hundred roundings to fp32, differ by 100 x 2**-24."""
    assert benchmark_relabel.main(["speed", "--num_pairs", "16", "--size", "64", "--batch_size", "8"]) < 1e-5
    assert "| relabel_pickapic.py |" in capsys.readouterr().out


def test_the_arithmetic_of_the_readme(capsys):
    benchmark_flops.main([])
    assert capsys.readouterr().out in (ROOT / "tests/benchmarks/README.md").read_text()


@pytest.mark.parametrize("case", ["tiny-full", pytest.param("tiny-sdxl-lora", marks=pytest.mark.slow)])
def test_training_speed_is_told_with_what_was_computed(case, monkeypatch, capsys):
    """Every pair at the timesteps that the script draws: UNet passes of each way to train, by hand."""
    for name, value in {"REPEATS": {"cpu": 1}, "MATRICES": {"cpu": (64, 1)}}.items():
        monkeypatch.setattr(benchmark_training, name, value)
    rows = benchmark_training.main(["--cases", case, "--batch_sizes", "2", "--num_pairs", "2"])
    assert capsys.readouterr().out.count(f"\n| {case} |") == len(rows)
    run = benchmark_training.Run(case, torch.float32)
    timesteps = {size: next(run.batches(run.parse(size)[1], size))["timesteps"] for size in (1, 2)}
    moves = (9 * (timesteps[2] + 1) + 999) // 1000
    levels = train_smpo_sd15.released_timesteps(timesteps[1], 10 if "sdxl" in case else 5, 1000)
    levels = (levels.diff() > 0).sum(dim=1)
    # For each image: inversion, correction, reference, and the policy with its gradient.
    script = 2 * (moves + 1 + 1 + 3), (moves.max() + 1 + 1 + 1) / 2
    expected = {
        "authors' recipe": (2 * (2 * levels + 1 + 3), 2 * levels + 2), "script": script,
        "inverted micro-batch by micro-batch": script,
        "Diffusion-DPO": (torch.tensor(2 * (1 + 3)), torch.tensor(1)),
    }  # fmt: skip
    for row in rows:
        passes, calls = (numbers.double().mean() for numbers in expected[row["how"]])
        assert row["UNet forwards a pair"] == passes and row["UNet calls a pair"] == calls
    released, script = (row["pairs/s"] * row["UNet forwards a pair"] for row in rows[:2])
    assert rows[1]["ratio"] == pytest.approx(script / released, rel=1e-9)
