"""What a run says of itself: held-out pairs, win rate over the base, the best checkpoint; and the precision of its files."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY, names_in, read_logs, relabel, run_script, train, train_flags, train_sdxl, unet_weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_standalone import LAUNCH
from transformers import CLIPModel, CLIPProcessor

import train_smpo_sd15
from diffusers import StableDiffusionPipeline
from train_smpo_sd15 import BEST_FILE, hold_out, score_validation, share_of


HELD_OUT = ("validation/loss", "validation/implicit_accuracy", "validation/reward_margin", "validation/std_tau")
FAST = {"label_column": "label_0", "noising": "forward", "rank": 2, "train_batch_size": 1}


def test_held_out_prompts_are_not_trained_on():
    pairs = datasets.Dataset(pq.read_table(TINY / "pairs" / "train.parquet"))
    rows = np.flatnonzero(np.random.default_rng(0).random(len(pairs)) < 0.8)
    args = SimpleNamespace(caption_column="caption", seed=0)
    captions = np.array(pairs["caption"][:])[rows]
    for share in (0.001, 0.1, 0.5):
        chosen = hold_out(pairs, rows, share, args)
        assert not set(captions[chosen]) & set(captions[~chosen])
        assert share * len(rows) <= chosen.sum() < share * len(rows) + 20  # a prompt more at most
    assert not np.array_equal(hold_out(pairs, rows, 0.1, SimpleNamespace(caption_column="caption", seed=1)), chosen)
    assert [share_of(value) for value in (None, "test", "0.1")] == [None, None, 0.1]


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """Nor counted among --max_train_samples."""
    parts = {}
    for share in (None, "0.2"):
        for limit in (None, 50):
            flags = {"label_column": "label_0", "validation_split": share, "max_train_samples": limit}
            args = train_smpo_sd15.parse_args(train_flags(tmp_path, **flags))
            parts[share, limit] = train_smpo_sd15.load_pairs(Accelerator(cpu=True), args)
    (_, everything, _), nothing = parts[None, None]
    for limit in (None, 50):
        (_, rows, labels), (_, held_out, held_out_labels) = parts["0.2", limit]
        assert nothing is None and len(rows) == len(labels) == (limit or len(everything) - len(held_out))
        assert not set(rows) & set(held_out) and set(rows) | set(held_out) <= set(everything)
        assert len(held_out_labels) == len(held_out) >= 0.2 * len(everything)


def test_held_out_accuracy_rises(tmp_path, labels_path):
    """From 0.5 by more than its interval, at the demo's settings; no training pair is among the held-out ones."""
    logs = train(
        tmp_path / "out", labels_path=labels_path, validation_split="0.25", validation_steps=15, max_train_steps=30,
        train_batch_size=16, learning_rate=3e-6, lr_warmup_steps=5, seed=0,
    )  # fmt: skip
    accuracy, num_pairs = logs["validation/implicit_accuracy"][-1], 64  # 4 micro-batches of 16 at least
    assert accuracy - 1.96 * np.sqrt(accuracy * (1 - accuracy) / num_pairs) > 0.5, accuracy
    assert logs["validation/reward_margin"][-1] > 0 and len(logs["validation/loss"]) == 2


def test_the_same_pairs_every_time(tmp_path):
    """A policy that does not move has the same numbers at every validation, and none of the training's."""
    flags = {
        **FAST, "noising": "renoise", "validation_split": "test", "learning_rate": 1e-12, "max_train_steps": 3,
        "validation_steps": 1, "max_validation_samples": 6, "train_batch_size": 2,
    }  # fmt: skip
    logs = train(tmp_path / "out", **flags)
    for name in ("validation/loss", "validation/reward_margin", "validation/std_tau"):
        assert len(logs[name]) == 3 and np.ptp(logs[name]) < 2e-4  # rounding, times beta
    assert logs["validation/loss"][0] == pytest.approx(np.log(2), abs=1e-4)
    assert logs["validation/std_tau"][0] != pytest.approx(logs["std_tau"][0], abs=1e-4)


def test_a_held_out_split_has_labels_of_its_own(tmp_path, labels_path):
    relabel(dataset_split_name="test", output_path=tmp_path / "test.parquet")
    flags = {"labels_path": labels_path, "validation_split": "test", "max_train_steps": 1, "max_validation_samples": 4}
    logs = train(tmp_path / "out", validation_labels_path=tmp_path / "test.parquet", **flags)
    assert len(logs["validation/loss"]) == 1
    with pytest.raises(
        ValueError, match="--validation_split test cannot be loaded: .* has no label for 64 of the 64 pairs"
    ):
        train(tmp_path / "none", **flags)


def test_two_processes_validate_as_one(tmp_path, monkeypatch):
    flags = {
        **FAST,
        "validation_split": "test",
        "max_validation_samples": 8,
        "max_train_steps": 2,
        "validation_steps": 1,
    }
    one = train(tmp_path / "one", **{**flags, "train_batch_size": 2})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_script(ROOT / "train_smpo_sd15.py", *train_flags(tmp_path / "two", **flags), cwd=tmp_path, launcher=LAUNCH)
    two = read_logs(tmp_path / "two")
    for name in HELD_OUT:
        np.testing.assert_allclose(one[name], two[name], rtol=2e-4)


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    """Win rates of the images under a reward model; the best one's checkpoint outlives the limit, and a resumed run knows it."""
    won = []
    compare_rewards = train_smpo_sd15.compare_rewards

    def remember(policy, base, step, args):
        won.append((step, policy, base))
        return compare_rewards(policy, base, step, args)

    monkeypatch.setattr(train_smpo_sd15, "compare_rewards", remember)
    (tmp_path / "prompts.txt").write_text("a large red circle\n\na small blue square\na large green cross\n")
    flags = {
        **FAST, "validation_prompts": tmp_path / "prompts.txt", "validation_reward_model": TINY / "pickscore",
        "validation_inference_steps": 3, "validation_guidance_scale": 1, "num_validation_images": 3, "validation_steps": 1,
        "checkpointing_steps": 1, "checkpoints_total_limit": 1, "learning_rate": 3e-3,
    }  # fmt: skip
    out = tmp_path / "out"
    logs = train(out, max_train_steps=4, **flags)
    rates = [float(((policy > base) + 0.5 * (policy == base)).mean()) for _, policy, base in won]
    assert [step for step, _, _ in won] == [1, 2, 3, 4] and won[0][1].shape == (3, 3)
    np.testing.assert_allclose(logs["validation/win_rate"], rates)
    assert logs["validation/base_median_reward"][0] == pytest.approx(np.median(won[0][2]))
    best = json.loads((out / BEST_FILE).read_text())
    assert not list(out.glob(".*.tmp"))
    assert best["step"] == 1 + int(np.argmax(rates)) and best["win_rate"] == max(rates)
    assert names_in(out) >= {best["checkpoint"], "checkpoint-4"}
    assert len(list(out.glob("checkpoint-*"))) == len({best["checkpoint"], "checkpoint-4"})
    assert (
        f"{max(rates):.1%} at step {best['step']}, checkpoint `{best['checkpoint']}`"
        in (out / "README.md").read_text()
    )
    train(out, max_train_steps=5, resume_from_checkpoint="latest", **flags)
    assert (out / json.loads((out / BEST_FILE).read_text())["checkpoint"]).is_dir() and len(won) == 5


def test_rewards_of_validation_images(sdxl, tmp_path):
    """Against transformers' own forward pass; and SDXL has the same flags."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15", torch_dtype=torch.float32)
    prompts = ["a large red circle", "a small blue square"]
    images = [pipeline([p] * 2, num_inference_steps=2, height=64, width=64).images for p in prompts]
    model = CLIPModel.from_pretrained(TINY / "pickscore").float().eval()
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    ours = score_validation(
        images, (model, processor), torch.device("cpu"), SimpleNamespace(validation_prompts=prompts)
    )
    for row, (prompt, drawn) in enumerate(zip(prompts, images)):
        with torch.no_grad():
            out = model(**processor(text=[prompt], images=drawn, return_tensors="pt", padding=True))
            cosines = out.logits_per_image[:, 0] / model.logit_scale.exp()
        np.testing.assert_allclose(ours[row], 100 * cosines, atol=1e-3)
    logs = train_sdxl(
        tmp_path / "out", sdxl, **FAST, max_train_steps=1, validation_prompts=prompts, validation_split="0.1",
        validation_reward_model=TINY / "pickscore", validation_inference_steps=2,
    )  # fmt: skip
    assert {"validation/win_rate", *HELD_OUT} <= set(logs)


def test_a_full_model_in_half_precision(tmp_path):
    flags = {**FAST, "rank": None, "max_train_steps": 1}
    train(tmp_path / "half", save_precision="fp16", **flags)
    train(tmp_path / "whole", **flags)
    half = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    for name, value in unet_weights(tmp_path / "whole").items():
        assert torch.equal(value.half(), half[name])
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.float32)
    assert pipeline("a red circle", num_inference_steps=1, height=64, width=64).images


def test_the_card_says_what_the_hub_reads(tmp_path):
    flags = {"dataset_name": "ada/pairs", "pretrained_model_name_or_path": "ada/model", "rank": 4}
    args = train_smpo_sd15.parse_args(train_flags(tmp_path / "out", **flags))
    (tmp_path / "out").mkdir()
    train_smpo_sd15.save_model_card(args, {"loss": 0.69}, None)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["ada/pairs"] and card.data.base_model == "ada/model"
    assert card.data.license == "creativeml-openrail-m" and card.data.pipeline_tag == "text-to-image"
    assert (
        {"smpo", "lora"} <= set(card.data.tags) and "| loss | 0.69 |" in card.text and "| `rank` | `4` |" in card.text
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"save_precision": "fp16"}, "--save_precision is that of a full model"),
        ({"validation_labels_path": "x"}, "(?s)does nothing without --validation_split.*x is not a file"),
        ({"validation_reward_model": "x"}, "--validation_reward_model does nothing without --validation_prompts"),
        ({"validation_split": "1.5"}, r"--validation_split must be a split or a share in \(0, 1\), got 1.5"),
        (
            {"validation_split": "0.1", "streaming": True},
            "--validation_split with a share needs pairs from everywhere",
        ),
        ({"validation_split": "none"}, "--validation_split none cannot be loaded: .*--dataset_split_name none"),
        ({"validation_split": "test", "max_validation_samples": 0}, "--max_validation_samples must be positive"),
        (
            {"validation_split": "0.001", "train_batch_size": 64},
            "--validation_split 0.001 holds .* a micro-batch takes 64",
        ),
        ({"validation_prompts": "none.txt"}, "--validation_prompts none.txt is not a file"),
        (
            {"validation_prompts": ["a"], "validation_reward_model": TINY / "sd15" / "text_encoder"},
            "--validation_reward_model .* cannot be loaded: it is a .*, not a CLIP-style model",
        ),
        (
            {
                "validation_prompts": ["a"],
                "validation_reward_model": "x",
                "validation_steps": 7,
                "checkpointing_steps": 2,
            },
            "--validation_steps 7 must be a multiple of --checkpointing_steps 2",
        ),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", **{**FAST, **flags})
