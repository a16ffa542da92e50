"""Training by several processes: FSDP2 and DeepSpeed's ZeRO-2, over gloo, give what one process gives."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import ROOT, read_logs, run_script, train, train_flags, unet_weights
from test_standalone import LAUNCH

import train_smpo_sd15
from diffusers.utils import is_accelerate_version
from train_smpo_sd15 import check_engine, invert, num_inversion_calls, parse_args


ENGINES = {
    "FSDP": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # accelerate's default, which the script turns off
    },
    "DeepSpeed": {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    },
}


@pytest.fixture(params=["FSDP", pytest.param("DeepSpeed", marks=pytest.mark.slow)])
def engine(request, monkeypatch, tmp_path):
    """Runs a training script in two processes under an engine and returns what it logged."""

    def run(script, output_dir, **flags):
        with monkeypatch.context() as patch:
            for name, value in ENGINES[request.param].items():
                patch.setenv(name, value)
            flags = train_flags(output_dir, **flags)
            run_script(ROOT / "tests" / "engine_on_cpu.py", script, *flags, cwd=tmp_path, launcher=LAUNCH)
        return read_logs(output_dir)

    run.name = request.param
    if run.name == "DeepSpeed":
        pytest.importorskip("deepspeed")
    elif is_accelerate_version("<", "1.13.0"):
        pytest.skip("refused")
    return run


def test_an_engine_is_one_process_and_resumes(engine, tmp_path, labels_path):
    """Two processes with a pair each, whose inversions take unlike numbers of moves, against one with two."""
    flags = {"labels_path": labels_path, "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-7}
    flags |= {
        "validation_prompts": ["a large red circle"],
        "num_validation_images": 1,
        "validation_inference_steps": 2,
        "validation_split": "0.1",
        "max_validation_samples": 6,
        "validation_steps": 2,
    }
    flags |= {"gradient_accumulation_steps": 2}
    sharded = engine("train_smpo_sd15", tmp_path / "sharded", train_batch_size=1, **flags)
    one = train(tmp_path / "one", train_batch_size=2, **flags)
    assert len(sharded["validation/loss"]) == 2
    for metric in ("loss", "grad_norm", "std_tau", "model_error_preferred", "lr", "epoch", "validation/loss"):
        np.testing.assert_allclose(sharded[metric], one[metric], rtol=5e-3, err_msg=metric)
    start = unet_weights(ROOT / "tests" / "tiny" / "sd15")
    whole, single = unet_weights(tmp_path / "sharded"), unet_weights(tmp_path / "one")
    moved = torch.cat([(single[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(single[name] - whole[name]).flatten() for name in start])
    assert moved.norm() > 0 and apart.norm() < 0.05 * moved.norm()
    assert (tmp_path / "sharded" / "validation" / "step-4.png").is_file()

    shutil.copytree(tmp_path / "sharded" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    engine("train_smpo_sd15", tmp_path / "resumed", train_batch_size=1, resume_from_checkpoint="latest", **flags)
    resumed = unet_weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # A checkpoint's UNet is whole and plain: the evaluation reads it.
    saved = unet_weights(tmp_path / "sharded" / "checkpoint-4")
    assert all(torch.equal(whole[name], saved[name]) for name in whole)


@pytest.mark.slow
def test_sdxl_in_bf16_starts_at_the_reference(engine, tmp_path, sdxl):
    logs = engine(
        "train_smpo_sdxl", tmp_path / "out", pretrained_model_name_or_path=sdxl, label_column="label_0",
        mixed_precision="bf16", train_batch_size=1, optimizer="adamw", gradient_checkpointing=True,
        inversion_guidance_scale=2.0,
    )  # fmt: skip
    assert logs["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    before, after = unet_weights(sdxl), unet_weights(tmp_path / "out")
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("noising, renoise_at", [("ddim", None), ("renoise", "last_move"), ("renoise", "every_move")])
def test_inversion_calls_are_counted_before_they_are_made(noising, renoise_at):
    alpha_bar = torch.linspace(0.999, 0.005, 1000)
    for t in ([0], [999], [10, 500, 999], [100, 100]):
        calls, t = [], torch.tensor(t)
        invert(
            lambda x, timesteps, rows: calls.append(1) or 0.1 * x,
            torch.randn(len(t), 4, 2, 2), t, alpha_bar, 9, noising, renoise_at or "last_move",
        )  # fmt: skip
        assert num_inversion_calls(t, alpha_bar, 9, noising, renoise_at or "last_move") == len(calls)


@pytest.mark.parametrize(
    "kind, settings, flags, message",
    [
        ("FSDP", {}, {"rank": 2}, "--rank: a LoRA is too small to be worth sharding: train it without FSDP"),
        ("DEEPSPEED", {}, {"rank": 2}, "--rank: a LoRA is too small .* without DEEPSPEED"),
        ("FSDP", {}, {"optimizer": "adafactor"}, "--optimizer adafactor cannot work on the shards of FSDP"),
        ("DEEPSPEED", {}, {"use_8bit_adam": True}, "--use_8bit_adam cannot work on the shards of DEEPSPEED"),
        ("FSDP", {"fsdp_version": 1}, {}, "Only version 2 of FSDP is supported"),
        ("FSDP", {"old": True}, {}, "FSDP needs accelerate 1.13.0 or later"),
        ("DEEPSPEED", {"zero_stage": 3}, {}, "Stages 1 and 2 of ZeRO are supported"),
        ("DEEPSPEED", {"zero_stage": 0}, {}, "Stages 1 and 2 of ZeRO are supported"),
        ("NO", {"accumulation": 4}, {"gradient_accumulation_steps": 2}, "steps 2, but accelerate's .* says 4"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(kind, settings, flags, message, tmp_path, monkeypatch):
    old = bool(settings.get("old"))
    monkeypatch.setattr(train_smpo_sd15, "is_accelerate_version", lambda *bound: old)
    settings = SimpleNamespace(**{"fsdp_version": 2, "zero_stage": 2, **settings})
    accelerator = SimpleNamespace(
        mixed_precision="bf16", device=torch.device("cpu"), distributed_type=DistributedType[kind],
        gradient_accumulation_steps=getattr(settings, "accumulation", 1),
        state=SimpleNamespace(fsdp_plugin=settings, deepspeed_plugin=settings),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        check_engine(accelerator, parse_args(train_flags(tmp_path, **flags)))
