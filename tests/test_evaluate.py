"""evaluate_smpo.py on the tiny models: what it draws, scores and says, what it keeps, and whom it refuses."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import hub_server
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, TWO_PROCESSES, command_line, read_logs, train
from fork_server import wait_for
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers
import evaluate_smpo
from diffusers import UNet2DConditionModel
from evaluate_smpo import UserError, load_prompts, parse_args, resample_prompts, summarise, win_interval, wins


SAME = f"same={TINY / 'sd15'}"  # the base under another name
EVIL = ['</p></script><script>alert(1)</script>"', "=1+1"]  # prompts
EVIL_NAME = '@"><img onerror=alert(1)>|*a*'  # of a file of prompts


def evaluation_flags(output_dir, **flags):
    defaults = {
        "pretrained_model_name_or_path": TINY / "sd15", "models": SAME, "reward_model": TINY / "pickscore",
        "prompts_path": TINY / "pairs" / "test.parquet", "max_prompts": 3, "num_inference_steps": 2,
        "guidance_scale": 1.0, "resolution": 64, "batch_size": 24, "output_dir": output_dir,
    }  # fmt: skip
    return command_line(**{**defaults, **flags})


def evaluate(output_dir, **flags):
    evaluate_smpo.main(parse_args(evaluation_flags(output_dir, **flags)))
    return read_results(output_dir)


def read_record(output_dir):
    return json.loads((output_dir / "results.json").read_text())


def read_results(output_dir, reward="pickscore", group="all"):
    """`{model: its medians, and its win rate over base}`."""
    record, key = read_record(output_dir), {"reward": reward, "group": group}.items()
    models = {row["model"]: row for row in record["results"] if key <= row.items()}
    for row in record["win_rates"]:
        if row["opponent"] == "base" and key <= row.items():
            models[row["model"]].update(row)
    return models


def read_table(path):
    return pd.read_csv(path, float_precision="round_trip").to_dict("records")


def images_in(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}


def scores_in(folder):
    """What is kept: `{file: {key: score}}`."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("scores/*.json")}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A training run with three checkpoints."""
    folder = tmp_path_factory.mktemp("lora")
    flags = {"learning_rate": 3e-2, "max_train_steps": 3, "checkpointing_steps": 1}
    train(folder, noising="forward", label_column="label_0", rank=2, **flags)
    return folder


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


@pytest.fixture(scope="module")
def whole(damaged, tmp_path_factory):
    """All that an evaluation writes, of two groups of 6 prompts with 2 images each; its folder, and its flags."""
    folder, captions = tmp_path_factory.mktemp("whole"), pq.read_table(TINY / "pairs" / "test.parquet")["caption"]
    texts = {EVIL_NAME: [*EVIL, *captions[:4].to_pylist()], "plain": captions[4:10].to_pylist()}
    for name, prompts in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    flags = {
        "models": [SAME, f"damaged={damaged}"], "prompts_path": [folder / f"{name}.txt" for name in texts],
        "max_prompts": None, "num_images_per_prompt": 2, "num_inference_steps": 4,
        "reward_model": [TINY / "pickscore", f"other={TINY / 'pickscore'}"],
    }  # fmt: skip
    extras = {"blind": True, "report_to": "tensorboard", "pairs_path": folder / "pairs.parquet"}
    evaluate(folder / "out", **flags, **extras)
    return folder, flags


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, which goes on with what is there, and its flags."""
    return shutil.copytree(whole[0] / "out", tmp_path / "copy"), whole[1]


# What it says


def test_itself_and_a_damaged_model(whole):
    folder = whole[0] / "out"
    results, rows = read_results(folder), read_table(folder / "scores.csv")
    same, worse = results["same"], results["damaged"]
    assert same["median"] == results["base"]["median"]
    assert (same["win_rate"], same["win_rate_low"], same["win_rate_high"], same["tie_rate"]) == (0.5, 0.5, 0.5, 1)
    assert len(rows) == 3 * 24 and all((folder / row["image"]).is_file() for row in rows)
    base, _, tuned = np.array([row["pickscore"] for row in rows]).reshape(3, 24)
    assert worse["median"] == pytest.approx(np.median(tuned)) and worse["mean"] < results["base"]["mean"]
    assert worse["win_rate"] == pytest.approx((tuned > base).mean()) and same["median_less_base_low"] == 0
    assert [row["seed"] for row in rows if row["model"] == "base"] == list(range(24))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(TINY / "sd15", torch_dtype=torch.float32)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "np"}
    for seed in (0, 5, 18):  # drawn alone, not in a batch of 24
        drawn = pipeline(rows[seed]["prompt"], generator=torch.Generator().manual_seed(seed), **options).images[0]
        kept = np.asarray(Image.open(folder / rows[seed]["image"])) / 255
        np.testing.assert_allclose(drawn, kept, rtol=0, atol=1 / 255)  # of 8 bits, half a level, and rounding

    record = read_record(folder)
    assert record["versions"]["diffusers"] == diffusers.__version__
    assert record["command"] == sys.argv and record["args"]["num_images_per_prompt"] == 2
    processor = record["rewards"]["pickscore"]["image_processor"]
    assert processor.startswith("CLIPImageProcessor") and '"resample": 3' in processor
    key = {"reward": "pickscore", "group": "all"}.items()
    win_rate = {(row["model"], row["opponent"]): row["win_rate"] for row in record["win_rates"] if key <= row.items()}
    assert len(win_rate) == 6 and all(win_rate[pair] + win_rate[pair[::-1]] == pytest.approx(1) for pair in win_rate)
    assert [read_results(folder, group=group)["base"]["num_prompts"] for group in (EVIL_NAME, "plain")] == [6, 6]


def test_tables_are_safe_to_open(whole):
    """Neither Markdown nor a spreadsheet runs what a file of prompts holds, or its name."""
    text, escaped = (whole[0] / "out" / "results.md").read_text(), r'@"&gt;&lt;img onerror=alert(1)&gt;\|\*a\*'
    assert f"| pickscore | {escaped} (6, too few for an interval to mean much) | base |" in text and "<img" not in text
    cells = [(row["prompt"], row["group"]) for row in read_table(whole[0] / "out" / "scores.csv")]
    assert cells[0] == (EVIL[0], f"'{EVIL_NAME}") and cells[2][0] == "'=1+1"


def test_a_comparison_and_what_trackers_get(whole):
    """Thumbnails of the prompt that gains most above, base left of the model's at each seed."""
    folder, size = whole[0] / "out", evaluate_smpo.THUMBNAIL
    sheet, table = Image.open(folder / "comparison-damaged.png"), pd.read_csv(folder / "scores.csv")
    assert sheet.size == (4 * size, 12 * size)
    means = table.groupby(["prompt", "model"])["pickscore"].mean().unstack()
    first = table[table["prompt"] == (means["damaged"] - means["base"]).idxmax()].set_index("model")["image"]
    for i, path in enumerate([first["base"].iloc[0], first["damaged"].iloc[0], first["base"].iloc[1]]):
        image = Image.open(folder / path).resize((size, size))
        assert np.array_equal(sheet.crop((i * size, 0, (i + 1) * size, size)), image)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, worse = read_logs(folder), read_results(folder)["damaged"]
    assert logs["pickscore/all/damaged/median"] == [pytest.approx(worse["median"])]
    assert logs["pickscore/all/damaged/win_rate"] == [pytest.approx(worse["win_rate"])]
    (path,) = folder.glob("logs/smpo-evaluation/events*")
    assert EventAccumulator(str(path)).Reload().Tags()["images"] == ["same", "damaged"]


def test_the_best_checkpoint_and_every_way_to_name_a_model(damaged, lora_run, tmp_path):
    """A UNet folder, a folder with one, a LoRA file and folder, and the checkpoints of a run."""
    shutil.copy(lora_run / "pytorch_lora_weights.safetensors", tmp_path / "renamed.safetensors")
    models = {"unet": damaged / "unet", "folder": damaged, "lora": lora_run, "file": tmp_path / "renamed.safetensors"}
    results = evaluate(tmp_path / "out", models=[f"{k}={v}" for k, v in models.items()], run_dir=lora_run)
    assert list(results) == ["base", *models, "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert results["unet"]["mean"] == results["folder"]["mean"] != results["base"]["mean"]
    assert results["lora"]["mean"] == results["file"]["mean"] == results["checkpoint-3"]["mean"]
    assert results["checkpoint-3"]["mean"] not in (results["base"]["mean"], results["checkpoint-1"]["mean"])

    best = read_record(tmp_path / "out")["best"]
    assert best["win_rate"] == max(row["win_rate"] for name, row in results.items() if name[:5] == "check")
    assert best["model"] == f"checkpoint-{best['step']}" and 0 <= best["win_rate_on_other_half"] <= 1
    sentence = (tmp_path / "out" / "results.md").read_text().splitlines()[0]
    assert f"**{best['model']}** is the best of 3 checkpoints under pickscore: it wins over the base" in sentence
    assert "optimistic" in sentence and f"wins {best['win_rate_on_other_half']:.1%} on the other half" in sentence


# Runs


def test_a_killed_run_goes_on_with_what_it_has(damaged, tmp_path, server):
    """Killed in the midst of the base's images, and of its scores."""
    flags = evaluation_flags(tmp_path, models=f"damaged={damaged}", max_prompts=4, batch_size=1)
    for done in (lambda: len(images_in(tmp_path)) >= 3, lambda: len(scores_in(tmp_path)) >= 2):
        server.start(flags, module="evaluate_smpo")
        wait_for(done)
        server.end()
        images, scores = images_in(tmp_path), scores_in(tmp_path)
        assert len(images) < 8 and all(Image.open(tmp_path / path).size == (64, 64) for path in images)
    assert server.run(flags, module="evaluate_smpo") == 0
    assert images.items() <= images_in(tmp_path).items() and len(images_in(tmp_path)) == 8
    assert scores.items() <= scores_in(tmp_path).items()
    assert sum(map(len, scores_in(tmp_path).values())) == 8  # none is scored twice
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_score_that_is_no_number_is_refused(copy, tmp_path):
    """It is named with its image; what was scored before is kept."""
    folder, flags = copy
    shutil.rmtree(folder / "scores")
    reward = shutil.copytree(TINY / "pickscore", tmp_path / "reward")
    weights = load_file(reward / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = math.nan
    save_file(weights, reward / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="broken gives nan to .*images/base/00000-.*png"):
        evaluate(folder, **{**flags, "reward_model": [TINY / "pickscore", f"broken={reward}"], "batch_size": 2})
    kept = scores_in(folder)
    assert [len(of_batch) for of_batch in kept.values()] == [2]
    evaluate(folder, **{**flags, "reward_model": TINY / "pickscore"})
    assert kept.items() <= scores_in(folder).items() and sum(map(len, scores_in(folder).values())) == 72


def test_nothing_is_scored_twice_and_no_other_image_is_mistaken(copy):
    folder, flags = copy
    first, before, files = read_results(folder), images_in(folder), scores_in(folder)
    for path in folder.glob("scores/*.json"):
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({key: 2.0 if "/same/" in key else score for key, score in kept.items()}))
    more = evaluate(folder, **{**flags, "reward_model": [TINY / "pickscore", f"more={TINY / 'pickscore'}"]})
    assert more["same"]["mean"] == read_results(folder, "more")["same"]["mean"] == 2  # known by what it is
    assert images_in(folder) == before and scores_in(folder).keys() == files.keys()
    for path in list((folder / "images" / "same").iterdir())[1:]:
        path.touch()  # other images, which are scored again; and one is drawn again
    next((folder / "images" / "same").iterdir()).unlink()
    again = evaluate(folder, **flags)
    assert again["same"]["mean"] == pytest.approx(first["same"]["mean"]) and again["damaged"] == first["damaged"]


def test_images_of_something_else_are_not_mistaken(damaged, tmp_path):
    """Whatever makes an image, if it changes, makes another file; what does not leaves it."""
    model = shutil.copytree(damaged, tmp_path / "model")

    def images_of(name, **flags):
        args = parse_args(evaluation_flags(tmp_path, **{"models": f"mine={model}", "dtype": "float32", **flags}))
        jobs = evaluate_smpo.list_jobs(evaluate_smpo.locate_models(args), load_prompts(args), args)
        return {job.image for job in jobs if job.model == name}

    base, mine = images_of("base"), images_of("mine")
    other = shutil.copytree(TINY / "sd15", tmp_path / "sd15")
    assert base == images_of("base", pretrained_model_name_or_path=other)  # the same, elsewhere
    (other / "model_index.json").touch()
    (model / "notes.md").touch()
    for flag, value in [
        ("guidance_scale", 2.0), ("num_inference_steps", 3), ("resolution", 32), ("dtype", "bfloat16"), ("seed", 9),
        ("prompts_path", TINY / "pairs" / "train.parquet"), ("num_images_per_prompt", 2),
        ("pretrained_model_name_or_path", other),
    ]:  # fmt: skip
        assert len(base & images_of("base", **{flag: value})) <= (flag == "num_images_per_prompt"), flag
        assert len(mine & images_of("mine", **{flag: value})) <= (flag == "num_images_per_prompt"), flag
    assert mine == images_of("mine", models=[SAME, f"mine={model}"], batch_size=1) < images_of("mine", max_prompts=4)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes())  # trained further, say
    assert not mine & images_of("mine") and base == images_of("base")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def fail_halfway(file):
        file.write(b"new, but")
        raise OSError("disk full")

    (tmp_path / "record.json").write_text("old")
    with pytest.raises(UserError, match="record.json cannot be written .disk full.*start the same command again"):
        evaluate_smpo.write_whole(tmp_path / "record.json", fail_halfway)
    assert (tmp_path / "record.json").read_text() == "old"
    with pytest.raises(UserError, match="record.json/images/base/.* cannot be written"):
        evaluate(tmp_path / "record.json")


def test_two_processes_share_the_work(damaged, tmp_path, server):
    flags = {"models": f"damaged={damaged}", "max_prompts": 5, "batch_size": 2}
    one = evaluate(tmp_path / "one", **flags)
    args = evaluation_flags(tmp_path / "two", report_to="tensorboard", **flags)
    assert server.run(args, module="evaluate_smpo", **TWO_PROCESSES) == 0, server.output()
    assert server.output().count("Images, scores and pictures are in") == 1
    two = read_results(tmp_path / "two")
    assert read_logs(tmp_path / "two")["pickscore/all/damaged/win_rate"] == [pytest.approx(two["damaged"]["win_rate"])]
    assert two["damaged"]["mean"] == pytest.approx(one["damaged"]["mean"], abs=0.05)
    assert images_in(tmp_path / "one").keys() == images_in(tmp_path / "two").keys()
    assert sorted(len(kept) for kept in scores_in(tmp_path / "two").values()) == [1, 1, 2, 2, 2, 2]  # once each
    # One process finds the scores of two: it takes them, and another batch would give another last bit.
    assert evaluate(tmp_path / "two", **flags) == two


# The Hub


def push(cache, name, source):
    """Puts a new commit of a model repository into the folder that the Hub's clients keep, and returns it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = f"{len(list(folder.glob('snapshots/*'))):040x}"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return commit


def test_models_of_the_hub(damaged, tmp_path, monkeypatch):
    """A UNet alone and the model, each of a known commit; one that is pushed again is not mistaken for what it was."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commits = [push(tmp_path / "hub", "me/base", TINY / "sd15"), push(tmp_path / "hub", "me/unet", damaged / "unet")]
    reward = push(tmp_path / "hub", "me/pick", TINY / "pickscore")
    flags = {"pretrained_model_name_or_path": "me/base", "reward_model": "me/pick", "max_prompts": 1}
    flags["models"] = ["hub=me/unet", f"local={damaged}"]
    evaluate(tmp_path / "out", **flags)
    record = read_record(tmp_path / "out")
    assert [record["models"][name] for name in ("base", "hub")] == [f"me/base@{commits[0]}", f"me/unet@{commits[1]}"]
    pick = record["rewards"]["pick"]
    assert pick["reward_model"] == pick["reward_processor"] == "me/pick"
    assert pick["revision"] == pick["processor_revision"] == reward
    results = read_results(tmp_path / "out", "pick")
    assert results["hub"]["mean"] == results["local"]["mean"] != results["base"]["mean"]
    before, again = images_in(tmp_path / "out"), push(tmp_path / "hub", "me/unet", TINY / "sd15" / "unet")
    evaluate(tmp_path / "out", **flags)
    results, drawn = read_results(tmp_path / "out", "pick"), images_in(tmp_path / "out").keys() - before.keys()
    assert results["hub"]["mean"] == results["base"]["mean"] and [path.split("/")[1] for path in drawn] == ["hub"]
    assert read_record(tmp_path / "out")["models"]["hub"] == f"me/unet@{again}"
    push(tmp_path / "hub", "me/unet", TINY / "pairs")
    with pytest.raises(UserError, match="--models hub=me/unet holds test.parquet, train.parquet"):
        evaluate(tmp_path / "out", **flags)


def test_of_the_hub_only_what_tells_is_downloaded(tmp_path, monkeypatch):
    """A LoRA, or a model's configuration; and which commit it is of."""
    shutil.copytree(TINY / "sd15", tmp_path / "root" / "me" / "base")
    (tmp_path / "root" / "me" / "lora").mkdir()
    (tmp_path / "root" / "me" / "lora" / "style.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with hub_server.serve(tmp_path / "root") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        lora, base = (evaluate_smpo.locate("models", name) for name in ("me/lora", "me/base"))
        assert lora.kind == ("lora", "style.safetensors") and lora.identity == f"me/lora@{lora.commit}"
        assert base.kind == ("pipeline", None) and len(base.commit) == 40
        read = {path.rsplit("/", 1)[1] for _, path, _ in hub.requests if "/resolve/" in path}
        assert read == {"style.safetensors", "model_index.json", "config.json"}
        with pytest.raises(UserError, match="(?s)--models me/none cannot be loaded: .*Repository Not Found"):
            evaluate_smpo.locate("models", "me/none")


# Pages


class Tags(HTMLParser):
    """The tags of a page, each with its attributes and the text after it."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        if self.found:
            self.found[-1][2] += data

    def of(self, tag):
        return [(attributes, text.strip()) for name, attributes, text in self.found if name == tag]


def test_gallery(whole):
    """What it shows of whom; nothing of a prompt or group becomes a tag; gains are those of the table."""
    folder = whole[0] / "out"
    page, scores = (folder / "gallery.html").read_text(), read_table(folder / "scores.csv")
    tags, of_image = Tags(page), {row["image"]: row for row in scores}
    assert len(tags.of("script")) == 1 and "content-visibility: auto" in page
    assert [text for _, text in tags.of("p")[1:3]] == EVIL and tags.of("i")[0][1] == EVIL_NAME
    assert {attributes["src"] for attributes, _ in tags.of("img")} == of_image.keys()
    assert all(attributes["loading"] == "lazy" for attributes, _ in tags.of("img"))
    lines = iter(text for _, text in tags.of("br"))
    for attributes, _ in tags.of("img"):
        image = of_image[attributes["src"]]
        rivals = [row for row in scores if (row["prompt"], row["seed"]) == (image["prompt"], image["seed"])]
        for reward in ("pickscore", "other"):
            star = image[reward] == max(row[reward] for row in rivals)
            assert next(lines).split() == [reward, f"{image[reward]:.3f}", *["★"] * star]
    assert [text for _, text in tags.of("option")][3] == "by gain of damaged by pickscore"
    gains = np.array([json.loads(attributes["data-gains"]) for attributes, _ in tags.of("section")])
    results = read_results(folder)
    assert gains.mean(axis=0)[2] == pytest.approx(results["damaged"]["mean"] - results["base"]["mean"])


def read_duels(folder):
    page = (folder / "blind" / "index.html").read_text()
    return page, json.loads(re.search("const duels = (.*), key = ", page)[1])


def test_a_blind_page_and_its_votes(whole, copy, tmp_path):
    """The page names no model, its sides are in random order; votes become win rates in closed form, and pairs."""
    folder, flags = copy
    stale = folder / "blind" / f"{'0' * 16}.png"  # of an earlier evaluation
    stale.touch()
    (folder / "blind" / "mine.png").touch()
    flags = {**flags, "models": flags["models"][1], "reward_model": TINY / "pickscore"}
    evaluate(folder, **flags, blind=True)
    page, duels = read_duels(folder)
    assert not stale.exists() and len(list((folder / "blind").glob("*.png"))) == 48 + 1
    assert len(Tags(page).of("script")) == 1 and "base" not in page and "damaged" not in page
    of_image = {path.read_bytes(): path.parent.name for path in folder.glob("images/[bd]*/*.png")}
    sides = [[of_image[(folder / "blind" / duel[side]).read_bytes()] for side in ("left", "right")] for duel in duels]
    assert len(duels) == 24 and all(sorted(pair) == ["base", "damaged"] for pair in sides)
    assert 0 < sum(pair[0] == "base" for pair in sides) < 24 and len({duel["prompt"] for duel in duels[:4]}) > 1

    first, second, third = list(dict.fromkeys(duel["prompt"] for duel in duels))[:3]
    votes = []  # damaged wins at the first prompt, loses at the second, and ties at the third
    for duel, pair in zip(duels, sides):
        vote = {first: 1 + pair.index("damaged"), second: 1 + pair.index("base"), third: 0}.get(duel["prompt"])
        votes += [{"left": duel["left"], "right": duel["right"], "vote": vote, "voter": "a"}] * (vote is not None)
    (tmp_path / "early.json").write_text(json.dumps(votes[:3]))  # of the same browser: counted once
    (tmp_path / "one.json").write_text(json.dumps(votes))
    (tmp_path / "two.json").write_text(json.dumps([{**vote, "voter": "b"} for vote in votes if vote["vote"]]))
    pairs, files = tmp_path / "pairs.parquet", [tmp_path / f"{name}.json" for name in ("early", "one", "two")]
    evaluate(folder, **flags, votes=files, pairs_path=pairs)
    row = read_record(folder)["win_rates"][-1]
    assert (row["reward"], row["model"], row["opponent"], row["num_votes"]) == ("votes", "damaged", "base", 10)
    assert row["win_rate"] == pytest.approx(0.5) and row["tie_rate"] == pytest.approx(1 / 3)  # of prompts, not votes
    assert row["win_rate_low"] < 0.2 < 0.8 < row["win_rate_high"]
    assert "10 votes: **damaged** wins over the base 50.0%" in (folder / "results.md").read_text()

    rows = pq.read_table(pairs).to_pylist()
    assert len(rows) == 6 and "soft_label_0" not in rows[0]
    for row in rows:
        won = {first: "damaged", second: "base"}.get(row["caption"])
        assert row["label_0"] == 1 - row["label_1"] == (0.5 if won is None else float(row["model_0"] == won))
        assert [of_image[row["jpg_0"]], of_image[row["jpg_1"]]] == [row["model_0"], row["model_1"]]
    hard = {"label_column": "label_0", "gamma": 1, "dataset_name": pairs, "noising": "forward", "rank": 2}
    assert len(train(tmp_path / "trained", **hard)["loss"]) == 2


@pytest.mark.parametrize("votes, message", [
    ([{"left": "x.png", "right": "y.png", "vote": 1}], "it compares images that are not of this evaluation: .*"),
    ([{"vote": 3}], "3"),
])  # fmt: skip
def test_other_votes_are_refused(votes, message, copy, tmp_path):
    _, duels = read_duels(copy[0])
    (tmp_path / "votes.json").write_text(json.dumps([{**duels[0], **vote} for vote in votes]))
    with pytest.raises(UserError, match=f"(?s)--votes .* cannot be loaded: {message}\n.*the page of --blind in this"):
        evaluate(copy[0], **copy[1], votes=tmp_path / "votes.json")
    (tmp_path / "votes.json").write_text("[]")
    with pytest.raises(UserError, match="--votes .*votes.json: there are no votes in it"):
        evaluate(copy[0], **copy[1], votes=tmp_path / "votes.json")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_keys_of_the_blind_page(whole):
    """Its own script, without a browser: 1, 2 and 0 are votes when both images are there; all can be forgotten."""
    page, duels = read_duels(whole[0] / "out")
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    keys = ["3", "a", "1", "Enter", " ", "01", "12", "F1", "2", "0"]
    stands_in = f"""
        const stored = {{}}, elements = {{}}, confirm = () => true
        for (const name of ["prompt", "left", "right", "progress", "save", "forget"]) elements[name] = {{}}
        const document = {{ getElementById: name => elements[name] }}
        const localStorage = {{ getItem: name => stored[name] || null, setItem: (name, text) => stored[name] = text }}
        {script}
        document.onkeydown({{ key: "1" }})
        left.complete = right.complete = true
        left.naturalWidth = 64
        document.onkeydown({{ key: "1" }})
        right.naturalWidth = 64
        for (const key of {json.dumps(keys)}) document.onkeydown({{ key }})
        for (const held of ["repeat", "ctrlKey", "metaKey", "altKey"]) document.onkeydown({{ key: "1", [held]: true }})
        console.log(stored[key])
        forget.onclick()
        document.onkeydown({{ key: "2" }})
        console.log(stored[key])
    """
    done = subprocess.run(["node", "-e", stands_in], capture_output=True, text=True, check=True)
    votes, others = map(json.loads, done.stdout.splitlines())
    assert others == [{**votes[0], "vote": 2, "voter": others[0]["voter"]}] and others[0]["voter"] != votes[0]["voter"]
    assert [vote["vote"] for vote in votes] == [1, 2, 0] and len({vote["voter"] for vote in votes} - {""}) == 1
    assert [vote["left"] for vote in votes] == [duel["left"] for duel in duels[:3]]


# Pairs


def test_pairs_are_what_training_takes(whole, tmp_path):
    """The best and the worst of a prompt: columns, labels in closed form, and two steps on them."""
    pairs, scores = whole[0] / "pairs.parquet", read_table(whole[0] / "out" / "scores.csv")
    rows, values = pq.read_table(pairs).to_pylist(), [row["pickscore"] / 100 for row in scores]
    of_image = {(row["model"], row["seed"], row["prompt"].removeprefix("'")): row for row in scores}
    assert len(rows) == 12 == len({row["ranking_id"] for row in rows})
    for row in rows:
        sides = [of_image[row[f"model_{i}"], row[f"seed_{i}"], row["caption"]] for i in (0, 1)]
        first, second = (side["pickscore"] for side in sides)
        of_prompt = [side["pickscore"] for key, side in of_image.items() if key[2] == row["caption"]]
        assert {first, second} == {min(of_prompt), max(of_prompt)}
        assert (row["score_0_pickscore"], row["score_1_other"]) == (first, second)
        gap = (first - second) / 100 / (max(values) - min(values))  # the range of a published reward is its own
        assert row["soft_label_0"] == pytest.approx(1 / (1 + math.exp(-gap)), rel=1e-9)
        assert (row["label_0"], row["label_1"]) == (float(first > second), float(second > first))
        for i, side in enumerate(sides):
            assert row[f"jpg_{i}"] == (whole[0] / "out" / side["image"]).read_bytes()
            assert row[f"image_{i}_uid"] == hashlib.sha256(row[f"jpg_{i}"]).hexdigest()
    assert 0 < sum(row["label_0"] for row in rows) < 12  # the order says nothing
    assert len(train(tmp_path / "trained", dataset_name=pairs, noising="forward", rank=2)["loss"]) == 2
    with pytest.raises(UserError, match="--pairs_path .*pairs.parquet exists: move it away"):
        parse_args(evaluation_flags(tmp_path, pairs_path=pairs))


def test_pairs_of_the_base_alone_and_of_images_that_do_not_differ(tmp_path):
    pairs, alone = tmp_path / "pairs.parquet", {"models": None, "num_images_per_prompt": 3, "pairs": "all"}
    assert list(evaluate(tmp_path / "out", **alone, pairs_path=pairs)) == ["base"]
    assert (tmp_path / "out" / "gallery.html").read_text().count("★") == 1 + 3  # of each prompt
    assert len(pq.read_table(pairs)) == 3 * 3
    with pytest.raises(UserError, match="--pairs_path .*stays unwritten: of no prompt do two images differ"):
        evaluate(tmp_path / "same", pairs_path=tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists() and (tmp_path / "same" / "results.md").is_file()


def test_a_tie_is_labelled_as_one(tmp_path):
    """Two unlike images of one score are no choice: neither is the better one, whichever comes first."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    table = pd.DataFrame({"image": ["a.png", "b.png"], "prompt": ["x", "x"], "score": [1.0, 1.0]})
    args = SimpleNamespace(output_dir=tmp_path, votes=None, pairs=None)
    for scores, expected in (([1.0, 1.0], {0.5}), ([1.0, 2.0], {0.0, 1.0})):
        ((first, second),) = evaluate_smpo.couple_images(table.assign(score=scores), None, "score", args)
        assert {first["label"], second["label"]} == expected
    assert {line["image"]: line["label"] for line in (first, second)} == {"a.png": 0.0, "b.png": 1.0}


# Prompts


def prompts_of(*paths, **flags):
    """`{prompt: group}` of files."""
    flags = {"pretrained_model_name_or_path": "x", "models": SAME, "output_dir": "x", **flags}
    return load_prompts(parse_args(command_line(prompts_path=list(paths), **flags)))


def test_prompts_in_every_format(tmp_path):
    """HPDv2's four files of styles and Parti-Prompts' table are read as they are published."""
    hpd = []
    for style in ("anime", "concept-art", "paintings", "photo"):
        hpd.append(tmp_path / f"{style}.json")
        hpd[-1].write_text(json.dumps([f"{style} one", f"{style} two", "the same in all"]))
    groups = prompts_of(*hpd)
    assert list(groups)[:4] == ["anime one", "anime two", "the same in all", "concept-art one"]
    assert list(groups.values()) == ["anime"] * 3 + ["concept-art"] * 2 + ["paintings"] * 2 + ["photo"] * 2
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\na "red" bee\tAnimals\tBasic\t\na boat\tVehicles\tBasic\tx\n')
    assert prompts_of(parti, caption_column="Prompt") == {'a "red" bee': None, "a boat": None}

    rows = [{"caption": "a, b", "kind": 1}, {"caption": "c", "kind": 2}, {"caption": None, "kind": 2}]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    boat, two = {"a boat": None}, {"a, b": None, "c": None}
    for name, text, expected in [
        ("bom.txt", "a boat\n\n a boat\n", boat), ("bom.CSV", "caption\na boat\n", boat),
        ("bom.json", '["a boat"]', boat), ("rows.json", json.dumps(rows), two), ("rows.parquet", None, two),
        ("rows.jsonl", "\n".join(map(json.dumps, rows)), two), ("rows.csv", 'caption,kind\n"a, b",1\nc,2\n', two),
    ]:  # fmt: skip
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8-sig" if name[:3] == "bom" else "utf-8")
        assert prompts_of(tmp_path / name) == expected
    both = prompts_of(tmp_path / "rows.parquet", tmp_path / "bom.txt", max_prompts=1)
    assert both == {"a, b": "rows", "a boat": "bom"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("no.txt", None, "no.txt cannot be loaded: .*No such file"),
        ("prompts.doc", "a", "prompts.doc cannot be loaded: .*\nAccepted: UTF-8: txt with"),
        ("mixed.json", '["a", {"caption": "b"}]', "--caption_column caption holds {'caption': 'b'}, which is no text"),
        ("half.jsonl", '{"caption": "a"}\n{"caption', "half.jsonl cannot be loaded: "),
        ("empty.txt", "\n", "--prompts_path .*empty.txt has no prompts"),
        ("empty.csv", "caption,kind\n", "--prompts_path .*empty.csv has no prompts"),
        ("latin.txt", "une fianc\udce9e", "(?s)latin.txt cannot be loaded: 'utf-8' codec .*UTF-8: txt"),
        ("text.csv", "text,kind\na,b\n", "text.csv .* no --caption_column caption, but text, kind"),
        ("text.parquet", "text", "text.parquet cannot be loaded: .*caption"),
        (
            "bare.csv",
            "caption\na cat, asleep\na dog\n",
            "bare.csv .* has more cells than the first: quote texts with ','",
        ),
    ],
)
def test_bad_prompts_are_named(name, text, message, tmp_path):
    if name == "text.parquet":
        pd.DataFrame({text: ["a"]}).to_parquet(tmp_path / name)
    elif text is not None:
        (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path / name)


# Statistics


def test_statistics_in_closed_form():
    table = pd.DataFrame({
        "model": ["base"] * 4 + ["tuned"] * 4, "prompt": list("wxyz") * 2, "group": list("aabb") * 2,
        "r": [1.0, 2.0, 3.0, 4.0, 2.0, 2.0, 2.0, 5.0],
    })  # fmt: skip
    assert wins(table["r"].to_numpy()[4:], table["r"].to_numpy()[:4]).tolist() == [1, 0.5, 0, 1]
    results, duels = summarise(table, ["r"], seed=0)
    key = {"reward": "r", "group": "all", "model": "base", "median": 2.5, "mean": 2.5, "num_prompts": 4}
    assert key.items() <= results[0].items()
    lost, won = duels[:2]
    assert won["win_rate"] == 0.625 and won["win_rate_low"] < 0.625 < won["win_rate_high"] and won["tie_rate"] == 0.25
    assert (lost["opponent"], lost["win_rate"]) == ("tuned", 0.375)
    found = [(row["group"], row["win_rate"]) for row in duels if row["model"] == "tuned"]
    assert found[1:] == [("a", 0.75), ("b", 0.5)]
    text = evaluate_smpo.as_markdown(results, duels)
    assert "| tuned | 2.000 (2.000 to 5.000) | -0.500 (" in text and "| 2.750 | 62.5% (" in text
    assert "| r | b (2, too few for an interval to mean much) |" in text


def test_interval_of_what_is_wholly_won_or_lost():
    """Wilson's interval ends where the score test of that rate gives z: |rate - end| = z sqrt(end (1 - end) / n)."""
    for num_won, count in itertools.product((0, 1, 12, 24), (24, 500)):
        ends = win_interval((np.arange(count) < num_won).astype(float), resample_prompts(count, 0))
        rounding = 1e-12 * np.array([-1, 1])  # float64, of numbers below 1
        assert 0 <= ends[0] < ends[1] <= 1 and ends[0] + rounding[0] < num_won / count < ends[1] + rounding[1]
        for end in ends:
            if 1e-9 < end < 1 - 1e-9:
                z = abs(num_won / count - end) / np.sqrt(end * (1 - end) / count)
                assert z == pytest.approx(1.9599639845400545, rel=1e-9)  # float64, after a difference and a root
    assert win_interval(np.ones(24), resample_prompts(24, 0))[0] == pytest.approx(24 / (24 + 1.959964**2), abs=1e-6)


def test_interval_is_the_normal_one_for_many_prompts():
    rates = np.random.default_rng(0).choice([0, 0.5, 1], size=2000, p=[0.3, 0.2, 0.5])
    low, high = win_interval(rates, resample_prompts(2000, 0))
    mean, error = rates.mean(), rates.std() / np.sqrt(2000)
    # A quantile of 4,000 normal draws has a standard error of 0.042 of theirs; five of them.
    assert low == pytest.approx(mean - 1.96 * error, abs=0.21 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.21 * error)


@pytest.mark.parametrize("prompts, images", [(24, 1), (25, 1), (25, 3)])
def test_medians_of_resamples_are_those_of_the_images_drawn(prompts, images):
    """Ties among the values, even and odd numbers of images."""
    values = np.random.default_rng(1).integers(0, 9, (prompts, images)) / 7
    counts = resample_prompts(prompts, 0)
    assert (counts.sum(axis=1) == prompts).all() and abs(counts.mean(axis=0) - 1).max() < 5 / math.sqrt(4_000)
    drawn = ([v for row, times in zip(values.tolist(), count) for v in row * int(times)] for count in counts)
    assert evaluate_smpo.resampled_medians(values, counts).tolist() == [statistics.median(some) for some in drawn]


def test_the_best_on_the_other_half_is_the_mean_over_all_halves():
    rates, found = np.random.default_rng(2).random((6, 4)), []
    for half in itertools.combinations(range(6), 3):
        rest = [i for i in range(6) if i not in half]
        found.append(rates[rest, rates[list(half)].sum(axis=0).argmax()].mean())
    honest = evaluate_smpo.win_rate_on_other_half(rates, 0)
    assert honest == pytest.approx(np.mean(found), abs=5 * 0.5 / math.sqrt(1000))  # 5 standard errors
    noise = np.random.default_rng(3).integers(0, 2, (200, 40)).astype(float)  # forty checkpoints as good as the base
    assert evaluate_smpo.win_rate_on_other_half(noise, 0) < noise.mean(axis=0).max() - 0.02


# Mistakes


@pytest.mark.parametrize("layer, reason", [("unet.no_such_layer", ""), ("transformer.layer", "none of its layers is")])
def test_a_lora_of_another_model_is_refused(layer, reason, tmp_path):
    """By diffusers, or, where it only warns, here."""
    save_file({f"{layer}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"--models .*other.safetensors cannot be loaded: {reason}"):
        evaluate(tmp_path / "out", models=tmp_path / "other.safetensors")


def test_a_model_behind_a_link(damaged, tmp_path):
    (tmp_path / "unet").symlink_to(damaged / "unet")
    model, linked = (evaluate_smpo.locate("models", str(folder)) for folder in (damaged, tmp_path))
    assert linked.kind == model.kind == ("unet", "unet") and linked.identity == model.identity


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "checkpoint-500.safetensors"])
def test_other_weights_in_the_same_file_are_another_model(name, tmp_path):
    identities = set()
    for content in (b"one", b"another"):
        (tmp_path / name).write_bytes(content)
        identities |= {evaluate_smpo.locate("models", str(path)).identity for path in (tmp_path, tmp_path / name)}
    assert len(identities) == 2  # the file's, and that of a folder which has no other


def test_a_model_that_is_gone_and_one_that_draws_black(tmp_path):
    unet = UNet2DConditionModel.from_pretrained(TINY / "sd15", subfolder="unet", torch_dtype=torch.float32)
    with torch.no_grad():
        unet.conv_out.weight.fill_(math.nan)
    unet.save_pretrained(tmp_path / "broken")
    for _ in range(2):
        with pytest.raises(
            UserError, match="images/broken/.*png is all black: broken is .* overflows in float32: give"
        ):
            evaluate(tmp_path / "out", models=tmp_path / "broken", max_prompts=1)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "config.json").symlink_to(tmp_path / "none")
    with pytest.raises(UserError, match="--models .*gone cannot be loaded: .*No such file"):
        evaluate(tmp_path / "out", models=tmp_path / "gone")


def test_too_large_a_batch_is_named(tmp_path, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("of the card")

    with pytest.raises(torch.OutOfMemoryError), evaluate_smpo.explain_errors("models", "x"):
        out_of_memory()  # not the model's fault
    monkeypatch.setattr(evaluate_smpo, "load_pipeline", lambda *args: out_of_memory)
    with pytest.raises(UserError, match="--batch_size 24 does not fit into memory: give less.* of the card"):
        evaluate(tmp_path)


def test_images_of_another_machine_have_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_smpo, "draw_images", lambda *args: None)
    monkeypatch.setattr(evaluate_smpo, "score_missing", lambda *args: None)
    with pytest.raises(UserError, match="--output_dir .* lacks images/base/.*: machines have to share the folder"):
        evaluate(tmp_path)


def test_a_tracker_that_fails(copy, tmp_path, monkeypatch):
    """It is named, after all results are written; the same command goes on once it is mended."""
    folder, flags = copy
    flags = {**flags, "pairs_path": tmp_path / "mine.parquet"}
    monkeypatch.setattr(os, "linesep", "\r\n")  # of a system where pandas would double it
    shutil.rmtree(folder / "logs")
    (folder / "logs").touch()
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="--report_to tensorboard cannot be loaded: "):
        evaluate(folder, report_to="tensorboard", **flags)
    assert read_results(folder)["same"]["win_rate"] == 0.5 and b"\r" not in (folder / "scores.csv").read_bytes()
    (folder / "logs").unlink()
    evaluate(folder, report_to="tensorboard", **flags)
    assert (tmp_path / "mine.parquet").exists()


def test_a_broken_checkpoint_is_blamed_on_its_run(tmp_path):
    unet = tmp_path / "run" / "checkpoint-5" / "unet"
    unet.mkdir(parents=True)
    with pytest.raises(UserError, match="--run_dir .*run/checkpoint-5 holds none of the files that tell"):
        evaluate(tmp_path / "out", models=None, run_dir=tmp_path / "run")
    (unet / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--run_dir .*run/checkpoint-5 cannot be loaded: "):
        evaluate(tmp_path / "out", models=None, run_dir=tmp_path / "run", max_prompts=1)


def test_what_does_not_reach_the_disk_is_not_there(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a.json cannot be written .No space left on device.. .*: make room"):
        evaluate_smpo.save_text(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse_args(evaluation_flags(
        "~/out", models=["smpo=~/runs/lr=1e-5/checkpoint-50", "~/runs/a=b/last"], reward_model="~/pick",
        prompts_path="~/prompts.txt",
    ))  # fmt: skip
    runs = f"{tmp_path}/runs"
    assert args.models == {"smpo": f"{runs}/lr=1e-5/checkpoint-50", "last": f"{runs}/a=b/last"}
    assert args.reward_model == {"pick": f"{tmp_path}/pick"}
    assert (args.output_dir, args.prompts_path) == (f"{tmp_path}/out", [f"{tmp_path}/prompts.txt"])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prompts_path": None}, "required: --prompts_path"),
        ({"prompts_path": ""}, "--prompts_path: is empty: is the variable set that it comes from?"),
        ({"guidance_scale": math.inf}, "--guidance_scale: must be a number, 0 or more, got inf"),
    ],
)
def test_a_bad_value_is_named(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(tmp_path, **flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"models": None}, "Give tuned models with --models, or a run with --run_dir"),
        ({"models": None, "blind": True, "pairs_path": "x.parquet"}, "Give tuned models with --models"),
        ({"models": None, "pairs_path": "x.parquet"}, "--pairs_path needs two images of a prompt: give --num_images"),
        ({"pairs_path": "pairs.csv"}, "--pairs_path pairs.csv must end in .parquet"),
        ({"revision": "main"}, "--revision does nothing without a base model on the Hub"),
        ({"pairs": "all"}, "--pairs does nothing without --pairs_path"),
        ({"models": "smpo="}, "--models smpo= names no path: is the variable set"),
        ({"models": ".."}, "--models ..: '..' cannot name it"),
        ({"votes": "none.json"}, "--votes none.json cannot be loaded: .*No such file"),
        ({"models": ["base=x"]}, "'base' cannot name it"),
        ({"run_dir": TINY}, f"--run_dir {TINY} has no folders named checkpoint-STEP."),
        ({"reward_model": "seed=x"}, "--reward_model seed=x: 'seed' cannot name it, as it is taken"),
        ({"run_dir": TINY, "reward_model": "seed=x"}, "checkpoint-STEP.*\n--reward_model seed=x"),
        ({"models": ["mine=/no/such"]}, "(?s)--models /no/such cannot be loaded.*a file or folder that exists"),
        ({"models": [f"mine={TINY / 'pairs'}"]}, "(?s)--models mine=.*pairs holds test.parquet, .*a pipeline, UNet"),
        ({"models": [f"mine={TINY / 'judge.safetensors'}"]}, "--models .*judge.safetensors cannot be loaded: "),
        ({"models": [f"mine={TINY / 'sd15' / 'vae'}"]}, "--models .*vae cannot be loaded: "),
        ({"pretrained_model_name_or_path": TINY / "judge.safetensors"}, "no pipeline: .*.from_single_file"),
        ({"pretrained_model_name_or_path": "no/such"}, "--pretrained_model_name_or_path no/such cannot be loaded"),
        ({"reward_model": ["a/x", "b/x"]}, "--reward_model b/x: 'x' cannot name it"),
        ({"reward_model": "aesthetic=/no/head.pth"}, "(?s)--reward_model /no/head.pth cannot be loaded.*: pick"),
        ({"reward_model": TINY / "sd15" / "text_encoder"}, "not a CLIP-style model"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, **flags)
