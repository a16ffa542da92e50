"""Training by several processes that share the weights out: FSDP2, over gloo, gives what one process gives."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import TINY, read_logs, relabel, train, train_flags, unet_weights
from PIL import Image

import train_smpo_sd15
from diffusers.utils import is_accelerate_version
from train_smpo_sd15 import UserError, configure_engine, parse_args


FSDP = {
    "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    # Defaults of accelerate, which the script turns off.
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
METRICS = "loss grad_norm std_tau model_error_preferred weight lr epoch validation/loss validation/std_tau".split()
LOG_2 = float(-torch.nn.functional.logsigmoid(torch.zeros(())))


@pytest.fixture
def shard(server):
    """Runs a training script in two processes under FSDP, and returns what it logged."""
    if is_accelerate_version("<", "1.13.0"):
        pytest.skip("refused")

    def run(script, output_dir, **flags):
        flags = train_flags(output_dir, train_batch_size=1, **flags)
        assert server.run([script, *flags], num_processes=2, module="engine_on_cpu", **FSDP) == 0, server.output()
        return read_logs(output_dir)

    return run


def test_shards_train_as_one_process_and_resume(shard, tmp_path, labels_path):
    """Two processes with a pair each, whose inversions take unlike numbers of moves, against one with two pairs.

    Their sums are rounded in another order. A small beta, and an Adam whose step is as good as linear in the gradient
    (a large epsilon), do not magnify that. fp32 rounds by 6e-8 at most, so a relative 1e-3 is 16,000 roundings in one
    direction, while a lost gradient, a wrong mean, an old weight or another pair shows in the first digit.
    """
    relabel(dataset_split_name="test", output_path=tmp_path / "test.parquet")
    flags = {
        "labels_path": [labels_path, tmp_path / "test.parquet"], "beta_dpo": 20,
        "max_train_steps": 2, "checkpointing_steps": 1, "gradient_accumulation_steps": 2, "num_inversion_steps": 5,
        "learning_rate": 0.1, "adam_epsilon": 1, "adam_weight_decay": 0,
        "validation_prompts": ["a large red circle"], "num_validation_images": 1,
        "validation_inference_steps": 1, "validation_steps": 2,
    }  # fmt: skip
    sharded = shard("sd15", tmp_path / "sharded", validation_split="test", **flags)
    one = train(tmp_path / "one", train_batch_size=2, validation_split="test", **flags)
    assert sharded["loss"][0] == pytest.approx(LOG_2, abs=1e-7)  # an ulp or two
    assert len(sharded["validation/loss"]) == 1
    for metric in METRICS:
        np.testing.assert_allclose(sharded[metric], one[metric], rtol=1e-3, err_msg=metric)
    start, whole, single = (unet_weights(path) for path in (TINY / "sd15", tmp_path / "sharded", tmp_path / "one"))
    moved, apart = ([single[name] - other[name] for name in start] for other in (start, whole))
    assert torch.nn.utils.get_total_norm(apart) < 1e-3 * torch.nn.utils.get_total_norm(moved)
    # The base's images, left of the policy's, are the same.
    pictures = (np.asarray(Image.open(tmp_path / name / "validation" / "step-2.png")) for name in ("one", "sharded"))
    assert np.array_equal(*(picture[:, : train_smpo_sd15.THUMBNAIL] for picture in pictures))
    calls = [json.loads((tmp_path / "sharded" / f"calls-{rank}.json").read_text()) for rank in (0, 1)]
    assert calls[0] != calls[1]

    shutil.copytree(tmp_path / "sharded" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    # Without held-out pairs, for which the weights were gathered: both processes have to draw, though of one prompt.
    shard("sd15", tmp_path / "resumed", resume_from_checkpoint="latest", **flags)
    # A checkpoint's UNet is whole and plain: the evaluation reads it.
    for other in (tmp_path / "resumed", tmp_path / "sharded" / "checkpoint-2"):
        others = unet_weights(other)
        assert all(torch.equal(whole[name], others[name]) for name in whole)


@pytest.mark.slow
def test_sdxl_in_bf16_starts_at_the_reference(shard, tmp_path, sdxl):
    logs = shard(
        "sdxl", tmp_path / "out", pretrained_model_name_or_path=sdxl, label_column="label_0",
        mixed_precision="bf16", optimizer="adamw", gradient_checkpointing=True,
    )  # fmt: skip
    assert logs["loss"][0] == pytest.approx(LOG_2, abs=1e-7)
    before, after = unet_weights(sdxl), unet_weights(tmp_path / "out")
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize(
    "kind, settings, flags, message",
    [
        ("FSDP", {}, {"rank": 2}, "--rank: a LoRA is too small to be worth sharding: train it without FSDP"),
        ("FSDP", {}, {"optimizer": "adafactor"}, "--optimizer adafactor cannot work on the shards of FSDP"),
        ("FSDP", {}, {"use_8bit_adam": True}, "--use_8bit_adam cannot work on the shards of FSDP"),
        ("FSDP", {"fsdp_version": 1}, {}, "FSDP needs fsdp_version: 2 in accelerate's configuration"),
        ("FSDP", {"old": True}, {}, "fsdp_version: 2 in accelerate's configuration, and accelerate 1.13 or later"),
        ("DEEPSPEED", {}, {}, "DeepSpeed is not supported: configure accelerate for FSDP, version 2"),
        ("NO", {"accumulation": 4}, {"gradient_accumulation_steps": 2}, "steps 2, but accelerate's .* says 4"),
        ("NO", {"precision": "fp16"}, {}, "--mixed_precision fp16 needs a GPU"),
        ("NO", {"device": "mps"}, {}, "--mixed_precision bf16 is not supported on MPS"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(kind, settings, flags, message, tmp_path, monkeypatch):
    settings = {"fsdp_version": 2, "old": False, "accumulation": 1, "precision": "bf16", "device": "cpu", **settings}
    monkeypatch.setattr(train_smpo_sd15, "is_accelerate_version", lambda *bound: settings["old"])
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # set by the script, restored after the test
    accelerator = SimpleNamespace(
        mixed_precision=settings["precision"], device=torch.device(settings["device"]),
        distributed_type=DistributedType[kind], gradient_accumulation_steps=settings["accumulation"],
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=settings["fsdp_version"])),
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        configure_engine(accelerator, parse_args(train_flags(tmp_path, **flags)))
