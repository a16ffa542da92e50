"""evaluate_smpo.py on the tiny models: a model against itself, against a damaged one, and every way to name a model."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, command_line, run_script, train
from fork_server import ForkServer, wait_for
from PIL import Image
from test_standalone import LAUNCH
from transformers import CLIPModel, CLIPProcessor

import evaluate_smpo
from diffusers import UNet2DConditionModel
from evaluate_smpo import as_markdown, bootstrap_interval, load_prompts, parse_args, summarise, wins


def evaluation_flags(output_dir, **flags):
    defaults = {
        "pretrained_model_name_or_path": TINY / "sd15", "dataset_name": TINY / "pairs", "split": "test",
        "reward_model": TINY / "pickscore", "max_prompts": 24, "num_inference_steps": 8, "guidance_scale": 1.0,
        "resolution": 64, "batch_size": 24, "output_dir": output_dir,
    }  # fmt: skip
    return command_line(**{**defaults, **flags})


def evaluate(output_dir, **flags):
    evaluate_smpo.main(parse_args(evaluation_flags(output_dir, **flags)))
    return read_results(output_dir)


def read_results(output_dir, reward="pickscore", group="all"):
    """`{model: its medians, and its win rate over base}`."""
    record = json.loads((output_dir / "results.json").read_text())
    key = {"reward": reward, "group": group}.items()
    models = {row["model"]: row for row in record["results"] if key <= row.items()}
    for row in record["win_rates"]:
        if row["opponent"] == "base" and key <= row.items():
            models[row["model"]].update(row)
    return models


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
    assert (same["win_rate"], same["win_rate_low"], same["win_rate_high"], same["tie_rate"]) == (0.5, 0.5, 0.5, 1)
    assert worse["win_rate_high"] < 0.5 and worse["median"] < results["base"]["median"]

    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 24
    assert np.median([float(row["pickscore"]) for row in rows if row["model"] == "damaged"]) == pytest.approx(
        worse["median"]
    )
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert [row["seed"] for row in rows if row["model"] == "base"] == [str(i) for i in range(24)]
    text = (tmp_path / "results.md").read_text()
    assert (
        f"| damaged | {worse['median']:.3f} |" in text
        and "| pickscore, win rate over | base | same | damaged |" in text
    )
    assert Image.open(tmp_path / "comparison-damaged.png").width == 2 * 192
    assert Image.open(tmp_path / "gaps.png").size == (720, 480)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["opponent"]]
    win_rate = {(row["model"], row["opponent"]): float(row["win_rate"]) for row in rows}
    assert len(win_rate) == 6
    assert all(win_rate[pair] + win_rate[pair[::-1]] == pytest.approx(1) for pair in win_rate)


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


def test_images_do_not_depend_on_the_batch(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross\na square\n")
    flags = {"dataset_name": None, "split": None, "prompts_path": tmp_path / "prompts.txt", "num_inference_steps": 4}
    images = []
    for batch_size in (1, 3):
        folder = tmp_path / str(batch_size)
        evaluate(folder, models=[f"same={TINY / 'sd15'}"], batch_size=batch_size, **flags)
        images.append([np.array(Image.open(path), dtype=int) for path in sorted(folder.glob("images/base/*.png"))])
    assert len(images[0]) == 3 and np.abs(np.stack(images[0]) - np.stack(images[1])).max() <= 1


# Runs


def images_in(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}


def test_a_killed_run_goes_on_with_the_images_that_it_has(damaged, tmp_path):
    flags = {"models": [f"damaged={damaged}"], "max_prompts": 32, "batch_size": 4}
    whole = evaluate(tmp_path / "whole", **flags)
    out = tmp_path / "out"
    with ForkServer("evaluate_smpo", tmp_path / "log.txt") as server:
        args = evaluation_flags(out, **flags)
        for count in (6, 40):
            server.start(args)
            wait_for(lambda: len(images_in(out)) >= count)
            server.end()
            before = images_in(out)
            assert count <= len(before) < 64
            assert all(Image.open(out / path).size == (64, 64) for path in before)
        assert server.run(args) == 0
    assert before.items() <= images_in(out).items() and len(images_in(out)) == 64
    assert not list(out.rglob("*.tmp"))
    results = read_results(out)
    assert results["damaged"]["win_rate"] == pytest.approx(whole["damaged"]["win_rate"], abs=0.02)
    assert results["base"]["mean"] == pytest.approx(whole["base"]["mean"], abs=0.05)  # another batch, another last bit


def test_images_of_something_else_are_not_mistaken(damaged, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(damaged, model)
    flags = {"models": [f"mine={model}"], "max_prompts": 4, "num_inference_steps": 2}
    evaluate(tmp_path / "out", **flags)
    before = images_in(tmp_path / "out")
    for change, message in [
        ({"guidance_scale": 2.0}, "--guidance_scale: 1.0 then, 2.0 now"),
        ({"max_prompts": 5}, "prompts: "),
        ({"models": [f"mine={TINY / 'sd15'}"]}, "model mine: "),
    ]:
        with pytest.raises(ValueError, match=f"(?s)--output_dir .* holds images of something else:.*{message}"):
            evaluate(tmp_path / "out", **{**flags, **change})
    results = evaluate(tmp_path / "out", **{**flags, "models": [f"mine={model}", f"more={TINY / 'sd15'}"]})
    assert before.items() <= images_in(tmp_path / "out").items() and results["more"]["win_rate"] == 0.5
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # trained further, say
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="(?s)holds images of something else:.*model mine"):
        evaluate(tmp_path / "out", **flags)


def test_two_processes_share_the_drawing(damaged, tmp_path, monkeypatch):
    flags = {"models": [f"damaged={damaged}"], "max_prompts": 9, "batch_size": 2, "num_inference_steps": 3}
    one = evaluate(tmp_path / "one", **flags)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = evaluation_flags(tmp_path / "two", **flags)
    output = run_script(ROOT / "evaluate_smpo.py", *args, cwd=tmp_path, launcher=LAUNCH)
    assert output.count("Images, scores and pictures are in") == 1
    two = read_results(tmp_path / "two")
    assert two["damaged"]["mean"] == pytest.approx(one["damaged"]["mean"], abs=0.05)
    assert images_in(tmp_path / "one").keys() == images_in(tmp_path / "two").keys()


def test_checkpoints_of_a_run(tmp_path):
    train(
        tmp_path / "run", noising="forward", label_column="label_0", rank=2, learning_rate=1e-3, max_train_steps=12,
        checkpointing_steps=4,
    )  # fmt: skip
    results = evaluate(tmp_path / "out", run_dir=tmp_path / "run", max_prompts=6, num_inference_steps=3)
    assert list(results) == ["base", "checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert results["checkpoint-12"]["mean"] != results["checkpoint-4"]["mean"]
    assert Image.open(tmp_path / "out" / "checkpoints.png").size == (840, 480)
    with pytest.raises(ValueError, match="--run_dir .*no folders named checkpoint-STEP"):
        evaluate(tmp_path / "none", run_dir=tmp_path)


# Prompts and rewards


def parsed(**flags):
    flags = {"pretrained_model_name_or_path": "x", "models": [f"same={TINY / 'sd15'}"], "output_dir": "x", **flags}
    return parse_args(command_line(**flags))


def test_prompts_in_every_format(tmp_path):
    """HPDv2's four files of styles and Parti-Prompts' table are read as they are published."""
    hpd = []
    for style in ("anime", "concept-art", "paintings", "photo"):
        hpd.append(tmp_path / f"{style}.json")
        hpd[-1].write_text(json.dumps([f"{style} one", f"{style} two", "the same in all"]))
    prompts, groups = load_prompts(parsed(prompts_path=hpd))
    assert prompts[:4] == ["anime one", "anime two", "the same in all", "concept-art one"] and len(prompts) == 9
    assert groups == ["anime"] * 3 + ["concept-art"] * 2 + ["paintings"] * 2 + ["photo"] * 2

    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\na "red" bee\tAnimals\tBasic\t\na boat\tVehicles\tBasic\tx\n')
    prompts, groups = load_prompts(parsed(prompts_path=parti, group_column="Category"))
    assert (len(prompts), groups) == (2, ["Animals", "Vehicles"]) and prompts[1] == "a boat"
    assert load_prompts(parsed(prompts_path=parti)) == (prompts, [None, None])

    rows = [{"caption": "a, b", "kind": 1}, {"caption": "c", "kind": 2}, {"caption": None, "kind": 2}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text('caption,kind\n"a, b",1\nc,2\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.csv", "rows.parquet"):
        assert load_prompts(parsed(prompts_path=tmp_path / name, group_column="kind")) == (["a, b", "c"], ["1", "2"])
    flags = {"dataset_name": tmp_path / "rows.parquet", "group_column": "kind", "max_prompts": 1}
    assert load_prompts(parsed(**flags)) == (["a, b"], ["1"])

    (tmp_path / "bad.json").write_text('{"a": 1}')
    (tmp_path / "mixed.json").write_text('["a", {"caption": "b"}]')
    (tmp_path / "half.json").write_text('["a", ')
    (tmp_path / "empty.txt").write_text("\n")
    for flags, message in [
        ({"prompts_path": tmp_path / "bad.json"}, "bad.json cannot be loaded: it holds no list of prompts"),
        ({"prompts_path": tmp_path / "mixed.json"}, "mixed.json cannot be loaded: it holds no list of prompts"),
        ({"prompts_path": tmp_path / "half.json"}, "half.json cannot be loaded"),
        ({"prompts_path": tmp_path / "empty.txt"}, "empty.txt.* has no prompts"),
        (
            {"prompts_path": hpd, "group_column": "kind"},
            "--group_column kind is one of a table: .*anime.json is a list",
        ),
        ({"prompts_path": tmp_path / "rows.csv", "caption_column": "text"}, "no column for --caption_column text"),
        (
            {"prompts_path": parti, "group_column": "Style"},
            "no column for --group_column Style. It has Prompt, Category",
        ),
        ({"dataset_name": tmp_path / "rows.parquet", "group_column": "x"}, "no column for --group_column x"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_prompts(parsed(**flags))


def test_several_rewards_and_groups(damaged, tmp_path):
    """The aesthetic head with weights laid out as LAION's, against the same layers written down."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*sizes) for sizes in ((64, 32), (32, 16), (16, 8), (8, 4), (4, 1))]
    weights = {}
    for number, layer in zip((0, 2, 4, 6, 7), layers):  # dropout lies between
        weights.update({f"layers.{number}.{name}": value for name, value in layer.state_dict().items()})
    torch.save(weights, tmp_path / "head.pth")
    results = evaluate(
        tmp_path / "out", models=[f"damaged={damaged}"], reward_model=[f"one={TINY / 'pickscore'}", TINY / "pickscore"],
        aesthetic_head=tmp_path / "head.pth", aesthetic_clip=TINY / "pickscore", max_prompts=12, num_inference_steps=3,
        group_column="model_0",
    )  # fmt: skip
    again = read_results(tmp_path / "out", "one")
    assert again["damaged"]["median"] == results["damaged"]["median"]
    groups = {row["group"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert len(groups) > 2 and "all" in groups
    counts = [read_results(tmp_path / "out", group=group)["base"]["num_prompts"] for group in groups - {"all"}]
    assert sum(counts) == 12

    weights["layers.9.weight"] = weights.pop("layers.7.weight")  # with ReLUs, layers have other numbers
    torch.save(weights, tmp_path / "relu.pth")
    with pytest.raises(ValueError, match="relu.pth cannot be loaded: it holds .*layers.9.weight"):
        evaluate_smpo.load_aesthetic_head(str(tmp_path / "relu.pth"))

    model = CLIPModel.from_pretrained(TINY / "pickscore").float()
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        row = list(csv.DictReader(file))[15]
    pixels = processor.image_processor(Image.open(tmp_path / "out" / row["image"]), return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        features = model.visual_projection(model.vision_model(pixels).pooler_output)
        x = features / features.norm()
        for layer in layers:
            x = layer(x)
    assert float(row["aesthetic"]) == pytest.approx(x.item(), abs=1e-5)
    assert "**aesthetic**" in (tmp_path / "out" / "results.md").read_text()


def test_statistics_in_closed_form():
    base, tuned = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[2.0], [2.0], [2.0], [5.0]])
    assert wins(tuned, base).ravel().tolist() == [1, 0.5, 0, 1]
    results, duels = summarise({"r": {"base": base, "tuned": tuned}}, ["a", "a", "b", "b"], seed=0)
    key = {"reward": "r", "group": "all"}
    assert results[0] == {**key, "model": "base", "median": 2.5, "mean": 2.5, "num_prompts": 4}
    lost, won = duels[:2]
    assert won["win_rate"] == 0.625 and won["win_rate_low"] < 0.625 < won["win_rate_high"] and won["tie_rate"] == 0.25
    assert (lost["opponent"], lost["win_rate"]) == ("tuned", 0.375)
    assert [(row["group"], row["win_rate"]) for row in duels if row["model"] == "tuned"][1:] == [
        ("a", 0.75),
        ("b", 0.5),
    ]
    text = as_markdown(results, duels)
    assert "| tuned | 2.000 | 2.750 | 62.5% |" in text and "**r**, b prompts (2)" in text


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
        ({"dataset_name": None, "prompts_path": TINY / "demo.jpg"}, "demo.jpg must end in .txt, .json, .csv"),
        ({"models": None}, "Give tuned models with --models, or the folder of a run with --run_dir"),
        ({"reward_model": ["a/x", "b/x"]}, "--reward_model b/x: 'x' cannot name it"),
        ({"reward_processor": ["a", "b"]}, "--reward_processor has 2 values for 1 reward models"),
        ({"aesthetic_head": "/no/head.pth"}, "--aesthetic_head /no/head.pth is not a file"),
        (
            {"aesthetic_head": TINY / "demo.jpg"},
            "(?s)--aesthetic_head .*demo.jpg cannot be loaded.*layers.N, N of 0, 2",
        ),
        ({"aesthetic_clip": "x"}, "--aesthetic_clip does nothing without --aesthetic_head"),
        ({"image_reward": True}, "--image_reward needs its package: pip install image-reward"),
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
