"""evaluate_smpo.py on the tiny models: a model against itself, against a damaged one, and every way to name a model."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, command_line, train
from PIL import Image

import evaluate_smpo
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from evaluate_smpo import as_markdown, bootstrap_interval, parse_args, summarise, wins


def evaluate(output_dir, **flags):
    defaults = {
        "pretrained_model_name_or_path": TINY / "sd15", "dataset_name": TINY / "pairs", "split": "test",
        "reward_model": TINY / "pickscore", "max_prompts": 24, "num_inference_steps": 8, "guidance_scale": 1.0,
        "resolution": 64, "batch_size": 24, "output_dir": output_dir,
    }  # fmt: skip
    evaluate_smpo.main(parse_args(command_line(**{**defaults, **flags})))
    return {row["model"]: row for row in json.loads((output_dir / "results.json").read_text())["results"]}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The tiny UNet with noise on its last layer, so that it draws worse."""
    folder = tmp_path_factory.mktemp("damaged")
    unet = UNet2DConditionModel.from_pretrained(TINY / "sd15", subfolder="unet", torch_dtype=torch.float32)
    with torch.no_grad():
        weight = unet.conv_out.weight
        weight.add_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    unet.save_pretrained(folder / "unet")
    return folder


def test_itself_and_a_damaged_model(damaged, tmp_path):
    results = evaluate(tmp_path, models=[f"same={TINY / 'sd15'}", f"damaged={damaged}"])
    same, worse = results["same"], results["damaged"]
    assert same["median"] == results["base"]["median"]
    assert (same["win_rate"], same["win_rate_low"], same["win_rate_high"]) == (0.5, 0.5, 0.5)
    assert worse["win_rate_high"] < 0.5 and worse["median"] < results["base"]["median"]

    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 24
    assert np.median([float(row["score"]) for row in rows if row["model"] == "damaged"]) == pytest.approx(
        worse["median"]
    )
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert [row["seed"] for row in rows if row["model"] == "base"] == [str(i) for i in range(24)]
    assert "| damaged |" in (tmp_path / "results.md").read_text()
    assert Image.open(tmp_path / "comparison-damaged.png").width == 2 * 192


def test_every_way_to_name_a_model(damaged, tmp_path):
    """A UNet folder, a folder with one, a LoRA file and folder and checkpoint; prompts from a text file."""
    train(
        tmp_path / "lora", noising="forward", label_column="label_0", rank=2, learning_rate=1e-2, max_train_steps=1,
        checkpointing_steps=1,
    )  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a large red circle\n\na small blue square\na large red circle\n")
    lora = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    shutil.copy(lora, tmp_path / "renamed.safetensors")
    models = {
        "unet": damaged / "unet", "folder": damaged, "lora": tmp_path / "lora", "file": tmp_path / "renamed.safetensors",
        "checkpoint": tmp_path / "lora" / "checkpoint-1",
    }  # fmt: skip
    results = evaluate(
        tmp_path / "out", models=[f"{name}={path}" for name, path in models.items()], dataset_name=None, split=None,
        prompts_path=tmp_path / "prompts.txt", num_images_per_prompt=2, max_prompts=None, batch_size=3,
    )  # fmt: skip
    assert results["unet"]["mean"] == results["folder"]["mean"] != results["base"]["mean"]
    assert (
        results["lora"]["mean"] == results["file"]["mean"] == results["checkpoint"]["mean"] != results["base"]["mean"]
    )
    assert len(list((tmp_path / "out" / "images" / "base").iterdir())) == 4


def test_images_do_not_depend_on_the_batch(damaged, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15", torch_dtype=torch.float32)
    args = {"prompts_path": None, "dataset_name": TINY / "pairs", "models": damaged, "output_dir": tmp_path}
    args |= {"pretrained_model_name_or_path": TINY / "sd15", "resolution": 64, "num_inference_steps": 4}
    images = []
    for batch_size in (1, 3):
        parsed = parse_args(command_line(**args, batch_size=batch_size))
        paths = evaluate_smpo.draw_images("base", pipeline, ["a red circle", "a blue cross", "a square"], parsed)
        images.append(np.stack([np.array(Image.open(path), dtype=int) for path in paths]))
    assert np.abs(images[0] - images[1]).max() <= 1


def test_statistics_in_closed_form():
    base, tuned = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[2.0], [2.0], [2.0], [5.0]])
    assert wins(tuned, base).ravel().tolist() == [1, 0.5, 0, 1]
    rows = summarise({"base": base, "tuned": tuned}, seed=0)
    assert rows[0] == {"model": "base", "median": 2.5, "mean": 2.5}
    assert rows[1]["win_rate"] == 0.625 and rows[1]["win_rate_low"] < 0.625 < rows[1]["win_rate_high"]
    assert "| tuned | 2.000 | 2.750 | 62.5% |" in as_markdown(rows)


def test_bootstrap_interval_is_the_normal_one_for_many_prompts():
    values = (np.random.default_rng(0).random((2000, 1)) < 0.6).astype(float)
    low, high = bootstrap_interval(values, seed=0)
    mean, error = values.mean(), values.std() / np.sqrt(len(values))
    assert low == pytest.approx(mean - 1.96 * error, abs=0.002)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.002)


def test_images_of_a_prompt_count_as_one_observation():
    """Doubling every image must not narrow the interval."""
    values = (np.random.default_rng(0).random((100, 1)) < 0.6).astype(float)
    assert bootstrap_interval(values, seed=0) == bootstrap_interval(np.repeat(values, 2, axis=1), seed=0)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dataset_name": None}, "one of --prompts_path and --dataset_name"),
        ({"dataset_name": None, "prompts_path": "/no/prompts.txt"}, "--prompts_path /no/prompts.txt is not a file"),
        ({"models": ["base=x"]}, "'base' cannot name it"),
        ({"models": ["a=x", "a=y"]}, "'a' cannot name it"),
        ({"models": ["mine=/no/such/model"]}, "/no/such/model is neither a Hub name nor"),
        ({"pretrained_model_name_or_path": "no/such"}, "--pretrained_model_name_or_path no/such cannot be loaded"),
        ({"reward_model": "no/such"}, "--reward_model no/such cannot be loaded"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be positive, got 0"),
        ({"caption_column": "prompt"}, "--caption_column prompt"),
        ({"reward_model": TINY / "sd15" / "text_encoder"}, "not a CLIP-style model"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, **{"models": [f"same={TINY / 'sd15'}"], **flags})
