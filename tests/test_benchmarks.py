"""The benchmarks count what they say."""

import csv
import sys

import benchmark_memory
import benchmark_relabel
import benchmark_training
import pytest
import torch
from benchmark_memory import LiveBytes, count, in_float32
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
    """So that their speeds can be compared."""
    assert benchmark_relabel.main(["speed", "--num_pairs", "32", "--size", "64", "--batch_size", "16"]) < 1e-5
    assert "| relabel_pickapic.py |" in capsys.readouterr().out


def test_models_of_a_benchmark_are_where_they_run():
    """The trained miniature, too, which is loaded to the CPU first."""
    run = benchmark_training.Run("tiny-full", torch.device("meta"), torch.float32)
    for part in ("unet", "ref_unet", "vae", "text_encoder"):
        assert {parameter.device.type for parameter in run.models[part].parameters()} == {"meta"}, part


def test_flags_after_two_dashes_reach_the_training_script(monkeypatch, capsys):
    seen = []
    sizes = dict.fromkeys(["UNet", "reference", "VAE, text", "gradients", "optimiser"], 2**30)
    monkeypatch.setattr(benchmark_memory, "count", lambda *arguments: seen.append(arguments) or (6 * 2**30, sizes))
    command = ["count", "--cases", "SD1.5 full, AdamW", "SDXL LoRA", "--", "--train_batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["benchmark_memory.py", *command])
    benchmark_memory.main()
    assert [(kind, flags[-2:]) for kind, _, flags in seen] == [("sd15", command[-2:]), ("sdxl", command[-2:])]
    assert "--train_batch_size 8" in capsys.readouterr().out


def test_a_row_that_fails_costs_no_other(tmp_path, monkeypatch):
    """Cases as they are come first; a case without AdamW has no row without its fusing; compilation is not begun late."""

    def time(run, size, num_pairs, flags=(), **options):
        if "--compile" in flags:
            raise RuntimeError("no compiler |\nat all")
        if size == 4:
            raise torch.OutOfMemoryError
        return {"pairs/s": float(size), "UNet forwards a pair": 10.0, "TFLOP/s": 1.0, "GiB": 2.0}

    monkeypatch.setattr(benchmark_training.Run, "time", time)
    monkeypatch.setattr(benchmark_training, "compare_precisions", lambda device: (0.0, 1.0))
    for limit, compiled in ((540, ["compiled blocks"]), (100, [])):
        command = ["--cases", "tiny-full", "tiny-lora", "--batch_sizes", "1", "2", "4", "--time_limit", limit]
        command += ["--variants", "AdamW parameter by parameter", "compiled blocks", "--output_dir", tmp_path]
        monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *map(str, command)])
        benchmark_training.main()
        with open(tmp_path / "training.csv") as file:
            rows = list(csv.DictReader(file))
        as_it_is = ["authors' recipe", *["script"] * 3]
        assert [row["how"] for row in rows] == 2 * as_it_is + ["AdamW parameter by parameter", *compiled]
        assert [row["GiB"] for row in rows[:4]] == ["2.0", "2.0", "2.0", "OOM"] and rows[2]["ratio"] == "2.0"
        assert rows[8]["pairs a micro-batch"] == "2"  # the largest that fits
        assert not compiled or rows[9]["GiB"] == "RuntimeError: no compiler /"
    assert not benchmark_training.applies("sdxl-full", "AdamW parameter by parameter", torch.bfloat16)
    assert benchmark_training.applies("sd15-full", "no channels_last", torch.bfloat16)
    assert not benchmark_training.applies("sd15-full", "no channels_last", torch.float32)


@pytest.mark.slow
def test_training_speed_of_sdxl(tmp_path, monkeypatch):
    command = ["--cases", "tiny-sdxl-lora", "--batch_sizes", "1", "2", "--num_pairs", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *command, "--output_dir", str(tmp_path)])
    benchmark_training.main()
    with open(tmp_path / "training.csv") as file:
        assert [row["how"] for row in csv.DictReader(file)] == ["authors' recipe", "script", "script"]


def test_training_speed_is_told_with_what_was_computed(tmp_path, monkeypatch, capsys):
    """Every pair at the timesteps that the script draws: UNet passes and phases of each way to train, counted by hand."""
    command = ["--cases", "tiny-full", "--batch_sizes", "2", "--num_pairs", "4", "--output_dir", tmp_path]
    command += ["--variants", "Diffusion-DPO"]
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *map(str, command)])
    benchmark_training.main()
    with open(tmp_path / "training.csv") as file:
        released, script, forward = csv.DictReader(file)
    run = benchmark_training.Run("tiny-full", torch.device("cpu"), torch.float32)
    args = run.parse(2, [])
    timesteps = next(run.batches(args, 4))["timesteps"]
    moves = (9 * (timesteps + 1) + 999) // 1000
    assert float(script["UNet forwards a pair"]) == pytest.approx(float(2 * (moves + 1 + 1 + 3).float().mean()))
    assert (
        float(script["UNet calls a pair"]) * 4 == int(moves.max()) + 1 + 1 + 2
    )  # inversion, reference, micro-batches
    assert float(forward["UNet forwards a pair"]) == 2 * (1 + 3)
    assert float(released["UNet forwards a pair"]) >= 2 * (2 + 1 + 3)
    for row in (released, script, forward):
        shares = [float(row[phase]) for phase in benchmark_training.PHASES]
        assert 0.9 < sum(shares) <= 1.0001 and all(share > 0 for share in shares[:3] + shares[4 + (row is released) :])
        assert (float(row["inversion"]) > 0.05) == (row is not forward)
    ratio = float(script["pairs/s"]) * float(script["UNet forwards a pair"])
    ratio /= float(released["pairs/s"]) * float(released["UNet forwards a pair"])
    assert float(script["ratio"]) == pytest.approx(ratio) and ratio > 1
    assert "| tiny-full | script | 2 |" in capsys.readouterr().out
