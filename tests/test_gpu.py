"""What a GPU decides: `pytest -m gpu` on a machine with one. With TINY=1 what makes sense in bf16 runs on a CPU."""

import math
import os
import shutil


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or its products are not the same twice

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, forget_accelerator, read_logs, relabel, run_script, train, train_flags, unet_weights
from random_models import make_vae, write_sdxl
from test_engines import FSDP
from test_evaluate import evaluate
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_smpo_sd15
import train_smpo_sdxl


CUDA = torch.cuda.is_available()
PRECISIONS = ["fp16", "bf16"] if CUDA else ["bf16"]
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
ROUNDING = {"fp16": 2**-11, "bf16": 2**-8}  # of one number, at most
both = pytest.mark.parametrize("run", ["sd15", "sdxl"], indirect=True)
both_on_a_gpu = pytest.mark.parametrize("run", ["sd15", "sdxl"] if CUDA else ["sd15"], indirect=True)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not os.environ.get("TINY"), reason="needs a GPU, or TINY=1"),
]


@pytest.fixture(autouse=True)
def deterministic(request, monkeypatch):
    if "with_the_kernels_of_a_run" in request.node.name:
        yield
        return
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):  # the backward passes of the others add up in any order
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(request, sdxl, labels_path):
    """Trains SD1.5 or SDXL in miniature for two steps of two micro-batches, and returns what it logged."""
    script, model = {"sd15": (train_smpo_sd15, TINY / "sd15"), "sdxl": (train_smpo_sdxl, sdxl)}[request.param]

    def run(output_dir, **flags):
        defaults = {
            "pretrained_model_name_or_path": model, "labels_path": labels_path, "gradient_accumulation_steps": 2,
            "checkpointing_steps": 1, "optimizer": "adamw", "train_batch_size": 1, "script": script,
        }  # fmt: skip
        forget_accelerator()  # and its precision
        return train(output_dir, **{**defaults, **flags})

    run.script, run.model = script, model
    return run


def assert_equal(folder, other_folder):
    """Two runs wrote the same final weights, bit for bit."""
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoint-" not in str(path):
            assert path.read_bytes() == (other_folder / path.relative_to(folder)).read_bytes(), path.name


@both
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_starts_at_the_reference_and_resumes_bit_for_bit(run, precision, rank, tmp_path):
    flags = {"mixed_precision": precision, "rank": rank, "gradient_checkpointing": True}
    logs = run(tmp_path / "whole", **flags)
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and np.isfinite(logs["loss"]).all()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    run(tmp_path / "resumed", resume_from_checkpoint="latest", **flags)
    assert_equal(tmp_path / "whole", tmp_path / "resumed")
    if rank is None:
        before, after = unet_weights(run.model), unet_weights(tmp_path / "whole")
        assert not [name for name in before if torch.equal(before[name], after[name])]


@both
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_starts_at_the_reference_with_the_kernels_of_a_run(run, precision, rank, tmp_path):
    """Attention, say, may have one kernel for a pass with a gradient and another for a pass without."""
    logs = run(tmp_path, mixed_precision=precision, rank=rank, max_train_steps=1)
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6)


@both_on_a_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_implied_noise_is_that_of_fp32(run, precision, tmp_path):
    """std(tau) before the first step; a hundred roundings in one direction would be within the bound, ten at random
    are well within. With a large beta fp16 would skip this step, and log the next."""
    flags = {"noising": "renoise", "beta_dpo": 1}
    half, single = (run(tmp_path / name, mixed_precision=name, **flags)["std_tau"][0] for name in (precision, "no"))
    assert half == pytest.approx(single, rel=10 * ROUNDING[precision])


@both_on_a_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_that_is_not_finite_changes_nothing(run, precision, tmp_path, monkeypatch):
    """fp16 lowers its scale then; it may have to do so before."""
    calls, training_step = [], run.script.training_step

    def infinite_once(*inputs):
        loss, metrics = training_step(*inputs)
        calls.append(loss)
        return (loss * math.inf, metrics) if len(calls) == 3 else (loss, metrics)

    monkeypatch.setattr(run.script, "training_step", infinite_once)
    logs = run(tmp_path, mixed_precision=precision)
    assert len(logs["loss"]) == 2 and logs["nonfinite_steps"][-1] >= 1
    assert all(weight.isfinite().all() for weight in unet_weights(tmp_path).values())


@both_on_a_gpu
@pytest.mark.parametrize("flag", ["use_8bit_adam", "offload"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_saves_memory_trains_alike(run, precision, flag, tmp_path):
    """Offloading changes no bit; 8-bit AdamW not before its first step."""
    if flag == "use_8bit_adam":
        pytest.importorskip("bitsandbytes")
    plain, saving = (
        run(tmp_path / name, mixed_precision=precision, **flags)
        for name, flags in (("plain", {}), ("saving", {flag: True}))
    )
    if flag == "offload":
        assert_equal(tmp_path / "plain", tmp_path / "saving")
    # Convolutions lie otherwise in memory with 8-bit AdamW, so that other kernels may round otherwise.
    assert saving["std_tau"][0] == pytest.approx(plain["std_tau"][0], rel=10 * ROUNDING[precision])
    assert np.isfinite(saving["loss"]).all()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fsdp_on_one_gpu_trains_as_without(precision, tmp_path, labels_path, monkeypatch):
    flags = {"labels_path": labels_path, "mixed_precision": precision, "beta_dpo": 20, "learning_rate": 1e-6}
    single = train(tmp_path / "single", **flags)
    settings = {key: value for key, value in FSDP.items() if key != "ACCELERATE_USE_CPU"}
    settings |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507"}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    run_script(ROOT / "train_smpo_sd15.py", *train_flags(tmp_path / "sharded", **flags), cwd=tmp_path)
    sharded = read_logs(tmp_path / "sharded")
    assert sharded["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    for metric in ("std_tau", "model_error_preferred", "grad_norm"):
        np.testing.assert_allclose(sharded[metric][0], single[metric][0], rtol=0.05, err_msg=metric)


def test_a_vae_that_overflows_in_fp16_is_kept_in_fp32(tmp_path, labels_path, monkeypatch):
    """SDXL's own does, and its configuration says so."""
    vae = make_vae("tiny-sdxl")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)  # the norms that follow take it back
    vae.register_to_config(force_upcast=True)
    monkeypatch.setattr("random_models.make_vae", lambda kind: vae)
    write_sdxl(tmp_path / "model")
    flags = {"labels_path": labels_path, "mixed_precision": PRECISIONS[0], "optimizer": "adamw", "noising": "renoise"}
    flags["pretrained_model_name_or_path"] = tmp_path / "model"
    logs = train(tmp_path / "run", train_smpo_sdxl, **flags)
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and 0.1 < logs["std_tau"][0] < 10
    pixels = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    vae = vae.to("cuda" if CUDA else "cpu", torch.float16)
    assert not train_smpo_sdxl.encode_images(pixels, vae, [0]).isfinite().any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_are_those_of_fp32(precision, tmp_path):
    """A cosine off by a rounding is a reward off by six (of the published range), a label by a quarter of that."""
    for dtype in ("float32", DTYPES[precision]):
        relabel(output_path=tmp_path / f"{dtype}.parquet", dtype=dtype)
    single, half = (pd.read_parquet(tmp_path / f"{dtype}.parquet") for dtype in ("float32", DTYPES[precision]))
    assert (half["soft_label_0"] - single["soft_label_0"]).abs().max() < 10 * ROUNDING[precision]
    assert half["soft_label_0"].corr(single["soft_label_0"]) > 0.99


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_evaluation_says_what_it_says_in_fp32(precision, tmp_path):
    """PickScore is 100 times a cosine, which ten roundings move by as many times the precision's."""
    medians = [
        evaluate(tmp_path / dtype, dtype=dtype, models=f"same={TINY / 'sd15'}")["base"]["median"]
        for dtype in ("float32", DTYPES[precision])
    ]
    assert medians[1] == pytest.approx(medians[0], abs=100 * 10 * ROUNDING[precision])
