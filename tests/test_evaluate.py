"""evaluate_smpo.py on the tiny models: what it draws, scores and says, what it keeps, and whom it refuses."""

import argparse
import csv
import hashlib
import itertools
import json
import math
import re
import runpy
import shutil
import sys
import time
from html.parser import HTMLParser

import hub_server
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, TWO_PROCESSES, command_line, train
from fork_server import wait_for
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import evaluate_smpo
from diffusers import UNet2DConditionModel
from evaluate_smpo import UserError, load_prompts, parse_args, resample_prompts, summarise, win_interval, wins


SAME = f"same={TINY / 'sd15'}"  # the base under another name


def evaluation_flags(output_dir, **flags):
    """Of the tiny data set's prompts, or of those in a file that is given."""
    prompts = {} if flags.get("prompts_path") else {"dataset_name": TINY / "pairs", "split": "test"}
    defaults = {
        "pretrained_model_name_or_path": TINY / "sd15", "models": SAME, "reward_model": TINY / "pickscore",
        "max_prompts": 3, "num_inference_steps": 2, "guidance_scale": 1.0, "resolution": 64, "batch_size": 24,
        "output_dir": output_dir, **prompts,
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


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A training run with three checkpoints."""
    folder = tmp_path_factory.mktemp("lora")
    flags = {"learning_rate": 1e-2, "max_train_steps": 12, "checkpointing_steps": 4}
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


def test_itself_and_a_damaged_model(damaged, tmp_path):
    models = [SAME, f"damaged={damaged}"]
    results = evaluate(tmp_path, models=models, max_prompts=24, num_inference_steps=8)
    same, worse = results["same"], results["damaged"]
    assert same["median"] == results["base"]["median"]
    assert (same["win_rate"], same["win_rate_low"], same["win_rate_high"], same["tie_rate"]) == (0.5, 0.5, 0.5, 1)
    assert worse["win_rate_high"] < 0.5 and worse["median"] < results["base"]["median"]

    rows = read_table(tmp_path / "scores.csv")
    assert len(rows) == 3 * 24
    scores = [float(row["pickscore"]) for row in rows if row["model"] == "damaged"]
    assert worse["median"] == pytest.approx(np.median(scores))
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert [row["seed"] for row in rows if row["model"] == "base"] == [str(i) for i in range(24)]
    text = (tmp_path / "results.md").read_text()
    assert f"| damaged | {worse['median']:.3f} (" in text
    assert worse["median_less_base_high"] < 0 and results["same"]["median_less_base_low"] == 0
    assert Image.open(tmp_path / "comparison-damaged.png").width == 2 * evaluate_smpo.THUMBNAIL
    processor = json.loads((tmp_path / "results.json").read_text())["rewards"]["pickscore"]["image_processor"]
    assert processor.startswith("CLIPImageProcessor") and '"resample": 3' in processor
    rows = [row for row in read_table(tmp_path / "results.csv") if row["opponent"]]
    win_rate = {(row["model"], row["opponent"]): float(row["win_rate"]) for row in rows}
    assert len(win_rate) == 6
    assert all(win_rate[pair] + win_rate[pair[::-1]] == pytest.approx(1) for pair in win_rate)


def test_every_way_to_name_a_model(damaged, lora_run, tmp_path):
    """A UNet folder, a folder with one, a LoRA file and folder and checkpoint; prompts from a text file."""
    (tmp_path / "prompts.txt").write_text("a large red circle\n\na small blue square\na large red circle\n")
    shutil.copy(lora_run / "pytorch_lora_weights.safetensors", tmp_path / "renamed.safetensors")
    models = {
        "unet": damaged / "unet", "folder": damaged, "lora": lora_run, "file": tmp_path / "renamed.safetensors",
        "checkpoint": lora_run / "checkpoint-12",
    }  # fmt: skip
    results = evaluate(
        tmp_path / "out", models=[f"{name}={path}" for name, path in models.items()], batch_size=3,
        prompts_path=tmp_path / "prompts.txt", num_images_per_prompt=2, max_prompts=None, num_inference_steps=4,
    )  # fmt: skip
    assert results["unet"]["mean"] == results["folder"]["mean"] != results["base"]["mean"]
    lora, file, checkpoint, base = (results[name]["mean"] for name in ("lora", "file", "checkpoint", "base"))
    assert lora == file == checkpoint != base
    assert len(images_in(tmp_path / "out")) == 6 * 4


def test_images_do_not_depend_on_the_batch(tmp_path):
    images = []
    for batch_size in (1, 3):
        evaluate(tmp_path / str(batch_size), batch_size=batch_size, num_inference_steps=4)
        paths = sorted((tmp_path / str(batch_size)).glob("images/base/*.png"))
        images.append([np.array(Image.open(path), dtype=int) for path in paths])
    assert len(images[0]) == 3 and np.abs(np.stack(images[0]) - np.stack(images[1])).max() <= 1


# Runs


def images_in(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}


def test_a_killed_run_goes_on_with_the_images_that_it_has(damaged, tmp_path, server):
    flags = {"models": f"damaged={damaged}", "max_prompts": 16, "batch_size": 2, "num_inference_steps": 6}
    whole, out = evaluate(tmp_path / "whole", **flags), tmp_path / "out"
    for count in (3, 20):
        server.start(evaluation_flags(out, **flags), module="evaluate_smpo")
        wait_for(lambda: len(images_in(out)) >= count)
        server.end()
        before = images_in(out)
        assert count <= len(before) < 32
        assert all(Image.open(out / path).size == (64, 64) for path in before)
    assert server.run(evaluation_flags(out, **flags), module="evaluate_smpo") == 0
    assert before.items() <= images_in(out).items() and len(images_in(out)) == 32
    assert not list(out.rglob("*.tmp"))
    results = read_results(out)
    assert results["damaged"]["win_rate"] == pytest.approx(whole["damaged"]["win_rate"], abs=0.04)
    assert results["base"]["mean"] == pytest.approx(whole["base"]["mean"], abs=0.05)  # another batch, another last bit


def test_images_of_something_else_are_not_mistaken(damaged, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(damaged, model)
    flags = {"models": f"mine={model}", "max_prompts": 4}
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


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def fail_halfway(path):
        path.write_text("new, but")
        raise OSError("disk full")

    (tmp_path / "record.json").write_text("old")
    with pytest.raises(UserError, match="record.json cannot be written .disk full.*start the same command again"):
        evaluate_smpo.save_whole(tmp_path / "record.json", fail_halfway)
    assert (tmp_path / "record.json").read_text() == "old"
    with pytest.raises(UserError, match="record.json/x/evaluation_args.json cannot be written"):
        evaluate(tmp_path / "record.json" / "x", models=f"mine={TINY / 'sd15'}")


def test_two_processes_share_the_work(damaged, tmp_path, server):
    flags = {"models": f"damaged={damaged}", "max_prompts": 9, "batch_size": 2}
    one = evaluate(tmp_path / "one", **flags)
    assert server.run(evaluation_flags(tmp_path / "two", **flags), module="evaluate_smpo", **TWO_PROCESSES) == 0, (
        server.output()
    )
    assert server.output().count("Images, scores and pictures are in") == 1
    two = read_results(tmp_path / "two")
    assert two["damaged"]["mean"] == pytest.approx(one["damaged"]["mean"], abs=0.05)
    assert images_in(tmp_path / "one").keys() == images_in(tmp_path / "two").keys()
    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "two" / "scores").iterdir())]
    assert len({**kept[0], **kept[1]}) == 18 and min(map(len, kept)) >= 8
    # One process finds the scores of two: it takes them, and another batch would give another last bit.
    assert evaluate(tmp_path / "two", **flags) == two


def test_nothing_is_scored_twice_and_no_other_image_is_mistaken(tmp_path):
    first = evaluate(tmp_path)
    path = tmp_path / "scores" / "0.json"
    kept = json.loads(path.read_text())
    kept.update({key: 2.0 for key in kept if key.startswith("images/same/")})
    path.write_text(json.dumps(kept))
    more = evaluate(tmp_path, reward_model=[TINY / "pickscore", f"more={TINY / 'pickscore'}"])
    assert more["same"]["mean"] == read_results(tmp_path, "more")["same"]["mean"] == 2  # known by what it is
    shutil.rmtree(tmp_path / "images" / "same")  # they are drawn and scored again
    assert evaluate(tmp_path)["same"]["mean"] == first["same"]["mean"]


def test_the_best_checkpoint_of_a_run(lora_run, tmp_path):
    results = evaluate(tmp_path / "out", models=None, run_dir=lora_run, max_prompts=6)
    assert list(results) == ["base", "checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert results["checkpoint-12"]["mean"] != results["checkpoint-4"]["mean"]
    best = json.loads((tmp_path / "out" / "results.json").read_text())["best"]
    assert best["win_rate"] == max(row["win_rate"] for name, row in results.items() if name != "base")
    assert best["model"] == f"checkpoint-{best['step']}" and 0 <= best["win_rate_on_other_half"] <= 1
    sentence = (tmp_path / "out" / "results.md").read_text().splitlines()[0]
    assert f"**{best['model']}** is the best of 3 checkpoints under pickscore: it wins over the base" in sentence
    assert "optimistic" in sentence and f"wins {best['win_rate_on_other_half']:.1%} on the other half" in sentence
    with pytest.raises(UserError, match="--run_dir .*no folders named checkpoint-STEP"):
        evaluate(tmp_path / "none", run_dir=tmp_path)


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
    flags = {"pretrained_model_name_or_path": "me/base", "reward_model": "me/pick"}
    flags["models"] = ["hub=me/unet", f"local={damaged}"]
    evaluate(tmp_path / "out", **flags)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [record["models"][name] for name in ("base", "hub")] == [f"me/base@{commits[0]}", f"me/unet@{commits[1]}"]
    pick = record["rewards"]["pick"]
    assert pick["reward_model"] == pick["reward_processor"] == "me/pick"
    assert pick["revision"] == pick["processor_revision"] == reward
    results = read_results(tmp_path / "out", "pick")
    assert results["hub"]["mean"] == results["local"]["mean"] != results["base"]["mean"]
    push(tmp_path / "hub", "me/unet", TINY / "sd15" / "unet")
    with pytest.raises(UserError, match=f"(?s)holds images of something else:.*model hub: me/unet@{commits[1]} then"):
        evaluate(tmp_path / "out", **flags)
    push(tmp_path / "hub", "me/unet", TINY / "pairs")
    with pytest.raises(UserError, match="--models hub=me/unet holds test.parquet, train.parquet"):
        evaluate(tmp_path / "new", **flags)
    assert not (tmp_path / "new").exists()


def test_a_lora_of_the_hub_is_known_before_it_is_downloaded(tmp_path, monkeypatch):
    repository = tmp_path / "root" / "me" / "lora"
    repository.mkdir(parents=True)
    (repository / "style.safetensors").write_bytes(b"")
    routes = [(pattern.replace("/api/datasets/", "/api/models/"), name) for pattern, name in hub_server.ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_server.serve(tmp_path / "root") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        source = evaluate_smpo.locate("models", "me/lora")
        assert source.kind == ("lora", "style.safetensors") and source.identity == f"me/lora@{source.commit}"
        assert [path for _, path, _ in hub.requests] == ["/api/models/me/lora"]
        with pytest.raises(UserError, match="(?s)--models me/none cannot be loaded: .*Repository Not Found"):
            evaluate_smpo.locate("models", "me/none")


# Prompts and rewards


def parsed(**flags):
    flags = {"pretrained_model_name_or_path": "x", "models": SAME, "output_dir": "x", **flags}
    return parse_args(command_line(**flags))


def prompts_of(**flags):
    """`{prompt: group}` that flags name."""
    return load_prompts(parsed(**flags))


def test_prompts_in_every_format(tmp_path):
    """HPDv2's four files of styles and Parti-Prompts' table are read as they are published."""
    hpd = []
    for style in ("anime", "concept-art", "paintings", "photo"):
        hpd.append(tmp_path / f"{style}.json")
        hpd[-1].write_text(json.dumps([f"{style} one", f"{style} two", "the same in all"]))
    groups = prompts_of(prompts_path=hpd)
    assert list(groups)[:4] == ["anime one", "anime two", "the same in all", "concept-art one"]
    assert list(groups.values()) == ["anime"] * 3 + ["concept-art"] * 2 + ["paintings"] * 2 + ["photo"] * 2

    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\na "red" bee\tAnimals\tBasic\t\na boat\tVehicles\tBasic\tx\n')
    assert prompts_of(prompts_path=parti, group_column="Category") == {'a "red" bee': "Animals", "a boat": "Vehicles"}
    assert prompts_of(prompts_path=parti) == {'a "red" bee': None, "a boat": None}

    for name, text in [("bom.txt", "a boat\n"), ("bom.csv", "caption\na boat\n"), ("bom.json", '["a boat"]')]:
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert prompts_of(prompts_path=tmp_path / name) == {"a boat": None}

    rows = [{"caption": "a, b", "kind": 1}, {"caption": "c", "kind": 2}, {"caption": None, "kind": 2}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.csv").write_text('caption,kind\n"a, b",1\nc,2\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        assert prompts_of(prompts_path=tmp_path / name, group_column="kind") == {"a, b": "1", "c": "2"}
    assert prompts_of(dataset_name=tmp_path / "rows.parquet", group_column="kind", max_prompts=1) == {"a, b": "1"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("bad.json", '{"a": 1}', "bad.json cannot be loaded: "),
        ("mixed.json", '["a", {"caption": "b"}]', "--caption_column caption holds {'caption': 'b'}, which is no text"),
        ("half.json", '["a", ', "half.json cannot be loaded: "),
        ("half.jsonl", '{"caption": "a"}\n{"caption', "half.jsonl cannot be loaded: "),
        ("empty.txt", "\n", "There are no prompts in .*empty.txt"),
        ("empty.csv", "caption,kind\n", "There are no prompts in .*empty.csv"),
        ("nothing.csv", "", "nothing.csv cannot be loaded: "),
        ("latin.txt", "une fianc\udce9e", "(?s)latin.txt cannot be loaded: 'utf-8' codec .*UTF-8: txt"),
        ("number.json", '[{"caption": 7}]', "--caption_column caption holds 7, which is no text"),
        ("text.csv", "text,kind\na,b\n", "text.csv .* no column for --caption_column caption, but text, kind"),
        ("style.tsv", "Prompt\tkind\na\tb\n", None),
        ("style.tsv", "Prompt\tcolor\na\tb\n", "no column for --group_column kind, but Prompt, color"),
    ],
)
def test_bad_prompts_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    flags = {"prompts_path": tmp_path / name, "group_column": "kind" if name == "style.tsv" else None}
    if message is None:
        assert prompts_of(**flags) == {"a": "b"}
    else:
        with pytest.raises(UserError, match=message):
            prompts_of(**flags)


def test_of_a_data_set_one_column_of_one_split_is_read(tmp_path):
    """All of the other split, and the pictures in this one, are overwritten with zeros."""
    folder = shutil.copytree(TINY / "pairs", tmp_path / "pairs")
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        metadata = pq.ParquetFile(path).metadata
        for group, i in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
            column = metadata.row_group(group).column(i)
            if path.stem == "train" or column.path_in_schema.startswith("jpg"):
                start = column.dictionary_page_offset or column.data_page_offset
                data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
        path.write_bytes(data)
    flags = {"split": "test", "max_prompts": 5, "group_column": "model_0"}
    found = prompts_of(dataset_name=folder, **flags)
    assert found == prompts_of(dataset_name=TINY / "pairs", **flags) and len(found) == 5
    with pytest.raises(UserError, match="(?s)--dataset_split_name validation cannot be loaded: .*validation"):
        prompts_of(dataset_name=TINY / "pairs", split="validation")
    with pytest.raises(UserError, match="no column for --group_column x"):
        prompts_of(dataset_name=TINY / "pairs", split="test", group_column="x")


def test_tables_are_safe_to_open(damaged, tmp_path):
    """Neither Markdown nor a spreadsheet runs what a file of prompts holds."""
    rows = [{"caption": "=1+1", "kind": "<img src=x onerror=alert(1)>|*a*"}, {"caption": "-2", "kind": "@b"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    evaluate(
        tmp_path / "out", models=f"damaged={damaged}", group_column="kind", prompts_path=tmp_path / "rows.json",
    )  # fmt: skip
    text = (tmp_path / "out" / "results.md").read_text()
    assert r"&lt;img src=x onerror=alert(1)&gt;\|\*a\* prompts (1, too few prompts" in text and "<img" not in text
    cells = [(row["prompt"], row["group"]) for row in read_table(tmp_path / "out" / "scores.csv")]
    assert cells[:2] == [("'=1+1", rows[0]["kind"]), ("'-2", "'@b")]


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


def test_gallery(damaged, tmp_path):
    """What it shows of whom; nothing of a prompt or group becomes a tag; gains are those of the table."""
    evil = '</td><script>alert(1)</script>"'
    rows = [{"caption": evil, "kind": '"><img src=x>'}, {"caption": "a red circle", "kind": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"group_column": "kind", "prompts_path": tmp_path / "rows.json", "num_images_per_prompt": 2}
    results = evaluate(tmp_path / "out", models=[SAME, f"damaged={damaged}"], **flags)
    tags = Tags((tmp_path / "out" / "gallery.html").read_text())
    assert len(tags.of("script")) == 1 and len(tags.of("img")) == len(tags.of("a")) == 3 * 2 * 2
    scores = read_table(tmp_path / "out" / "scores.csv")
    score_of = {row["image"]: float(row["pickscore"]) for row in scores}
    assert {attributes["src"] for attributes, _ in tags.of("img")} == score_of.keys()
    assert all(attributes["loading"] == "lazy" for attributes, _ in tags.of("img"))
    assert [text for _, text in tags.of("option")][:3] == ["all groups", rows[0]["kind"], "b"]
    prompts = [text for _, text in tags.of("td") if text]
    assert prompts == [evil, "a red circle"] and [text for _, text in tags.of("th")] == ["prompt", *results]
    for (attributes, _), (_, text) in zip(tags.of("img"), tags.of("div")):
        *others, score = sorted(score_of[path] for path in score_of if path[-11:] == attributes["src"][-11:])
        own = score_of[attributes["src"]]
        assert text.split() == ["pickscore", f"{own:.3f}", *["★"] * (own == score)]
    gains = np.array([json.loads(attributes["data-gains"]) for attributes, _ in tags.of("tr")[1:]])
    less_base = [results[name]["mean"] - results["base"]["mean"] for name in ("same", "damaged")]
    assert gains.mean(axis=0) == pytest.approx(less_base)


def test_a_blind_page_and_its_votes(damaged, tmp_path):
    """The page names no model; its sides are in random order; votes become win rates over the base in closed form."""
    (tmp_path / "prompts.txt").write_text("</script><script>alert(1)\na red circle\na blue cross\n")
    flags = {"models": f"damaged={damaged}", "prompts_path": tmp_path / "prompts.txt", "num_images_per_prompt": 4}
    evaluate(tmp_path / "out", **flags, blind=True)
    page = (tmp_path / "out" / "blind" / "index.html").read_text()
    assert len(Tags(page).of("script")) == 1 and "base" not in page and "damaged" not in page
    duels = json.loads(re.search("const duels = (.*), key = ", page)[1])
    of_image = {path.read_bytes(): path.parent.name for path in (tmp_path / "out").glob("images/*/*.png")}
    sides = [
        [of_image[(tmp_path / "out" / "blind" / duel[side]).read_bytes()] for side in ("left", "right")]
        for duel in duels
    ]
    assert len(duels) == 12 and all(sorted(pair) == ["base", "damaged"] for pair in sides)
    assert 0 < sum(pair[0] == "base" for pair in sides) < 12 and len({duel["prompt"] for duel in duels[:4]}) > 1

    votes = []  # one person lets the red circles of the damaged model win, the rest of them lose, and ties the others
    for duel, pair in zip(duels, sides):
        vote = {"a red circle": 1 + pair.index("damaged"), "a blue cross": 1 + pair.index("base")}.get(
            duel["prompt"], 0
        )
        votes.append({"left": duel["left"], "right": duel["right"], "vote": vote})
    (tmp_path / "one.json").write_text(json.dumps(votes))
    (tmp_path / "two.json").write_text(json.dumps([vote for vote in votes if vote["vote"]]))
    evaluate(tmp_path / "out", **flags, votes=[tmp_path / "one.json", tmp_path / "two.json"])
    row = json.loads((tmp_path / "out" / "results.json").read_text())["win_rates"][-1]
    assert (row["reward"], row["model"], row["opponent"], row["num_votes"]) == ("votes", "damaged", "base", 20)
    assert (
        row["win_rate"] == 0.5 and row["tie_rate"] == 4 / 20 and row["win_rate_low"] < 0.2 < 0.8 < row["win_rate_high"]
    )
    assert "20 votes: **damaged** wins over the base 50.0%" in (tmp_path / "out" / "results.md").read_text()
    (tmp_path / "two.json").write_text('[{"left": "x.png", "right": "y.png", "vote": 1}]')
    with pytest.raises(
        UserError, match="(?s)--votes .*two.json cannot be loaded: 'x.png'.*the page of --blind in this"
    ):
        evaluate(tmp_path / "out", **flags, votes=[tmp_path / "two.json"])


def test_a_gallery_of_many_prompts_does_not_take_long(tmp_path):
    jobs = [
        (name, f"prompt {i}", "ab"[i % 2], seed, f"images/{name}/{i:05d}_{seed}.png", float(i))
        for name, i, seed in itertools.product(("base", "one", "two"), range(2000), (0, 1))
    ]
    table, start = pd.DataFrame(jobs, columns=[*evaluate_smpo.Job._fields, "pick"]), time.monotonic()
    evaluate_smpo.write_gallery(table, ["pick"], argparse.Namespace(output_dir=tmp_path))
    assert (tmp_path / "gallery.html").stat().st_size < 5e6 and time.monotonic() - start < 60


def test_a_score_that_is_no_number_is_refused(tmp_path):
    reward = shutil.copytree(TINY / "pickscore", tmp_path / "reward")
    weights = load_file(reward / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = math.nan
    save_file(weights, reward / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="broken gives nan to .*images/base/00000_0.png"):
        evaluate(tmp_path, reward_model=f"broken={reward}")
    before = images_in(tmp_path)
    assert len(before) == 3
    evaluate(tmp_path)
    assert before.items() <= images_in(tmp_path).items()


def test_several_rewards_and_groups(damaged, tmp_path):
    """The aesthetic head with weights laid out as LAION's, against the same layers written down."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*sizes) for sizes in ((64, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))]
    weights = {}
    for number, layer in zip((0, 2, 4, 6, 7), layers):  # dropout lies between
        weights.update({f"layers.{number}.{name}": value for name, value in layer.state_dict().items()})
    folder = shutil.copytree(TINY / "pickscore", tmp_path / "head")
    torch.save(weights, folder / "aesthetic-model.pth")
    results = evaluate(
        tmp_path / "out", models=f"damaged={damaged}", group_column="model_0", max_prompts=12,
        reward_model=[f"one={TINY / 'pickscore'}", TINY / "pickscore", f"aesthetic={folder}"],
    )  # fmt: skip
    again = read_results(tmp_path / "out", "one")
    assert again["damaged"]["median"] == results["damaged"]["median"]
    groups = {row["group"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert len(groups) > 2 and "all" in groups
    counts = [read_results(tmp_path / "out", group=group)["base"]["num_prompts"] for group in groups - {"all"}]
    assert sum(counts) == 12

    model = CLIPModel.from_pretrained(TINY / "pickscore").float()
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    row = read_table(tmp_path / "out" / "scores.csv")[15]
    inputs = processor.image_processor(Image.open(tmp_path / "out" / row["image"]), return_tensors="pt")
    with torch.no_grad():
        features = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        x = features / features.norm()
        for layer in layers:
            x = layer(x)
    assert float(row["aesthetic"]) == pytest.approx(x.item(), abs=1e-5)
    assert "**aesthetic**" in (tmp_path / "out" / "results.md").read_text()


# Statistics


def test_statistics_in_closed_form():
    base, tuned = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[2.0], [2.0], [2.0], [5.0]])
    assert wins(tuned, base).ravel().tolist() == [1, 0.5, 0, 1]
    results, duels = summarise({"r": {"base": base, "tuned": tuned}}, ["a", "a", "b", "b"], seed=0)
    key = {"reward": "r", "group": "all", "model": "base", "median": 2.5, "mean": 2.5, "num_prompts": 4}
    assert key.items() <= results[0].items()
    lost, won = duels[:2]
    assert won["win_rate"] == 0.625 and won["win_rate_low"] < 0.625 < won["win_rate_high"] and won["tie_rate"] == 0.25
    assert (lost["opponent"], lost["win_rate"]) == ("tuned", 0.375)
    found = [(row["group"], row["win_rate"]) for row in duels if row["model"] == "tuned"]
    assert found[1:] == [("a", 0.75), ("b", 0.5)]
    text = evaluate_smpo.as_markdown(results, duels)
    assert "| tuned | 2.000 (2.000 to 5.000) | -0.500 (" in text and "| 2.750 | 62.5% (" in text
    assert "**r**, b prompts (2, too few prompts for an interval to mean much)" in text


def test_interval_of_what_is_wholly_won_or_lost():
    """Wilson's interval ends where the score test of that rate gives z: |rate - end| = z sqrt(end (1 - end) / n)."""
    for images, num_won, count in itertools.product((1, 3), (0, 1, 12, 24), (24, 500)):
        values = np.repeat(np.arange(count) < num_won, images).reshape(count, images).astype(float)
        ends = win_interval(values.mean(axis=1), resample_prompts(count, 0))
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


@pytest.mark.parametrize("images", [1, 2])
def test_medians_of_resamples_are_binomial(images):
    """Of 25 values, the median of a resample is at most the k-th if 13 draws or more are among the k lowest.

    Twice the same image says nothing new.
    """
    values = np.random.default_rng(1).permutation(np.arange(25.0))
    medians = evaluate_smpo.resampled_medians(np.repeat(values[:, None], images, axis=1), resample_prompts(25, 0))
    for k in range(1, 26):
        exact = sum(math.comb(25, j) * (k / 25) ** j * (1 - k / 25) ** (25 - j) for j in range(13, 26))
        assert (medians <= k - 1).mean() == pytest.approx(exact, abs=5 * 0.5 / math.sqrt(4_000))  # 5 standard errors


def test_the_best_on_the_other_half_is_the_mean_over_all_halves():
    rates, found = np.random.default_rng(2).random((6, 4)), []
    for half in itertools.combinations(range(6), 3):
        rest = [i for i in range(6) if i not in half]
        found.append(rates[rest, rates[list(half)].sum(axis=0).argmax()].mean())
    assert evaluate_smpo.win_rate_on_other_half(rates, 0) == pytest.approx(
        np.mean(found), abs=5 * 0.5 / math.sqrt(1000)
    )  # as above
    noise = np.random.default_rng(3).integers(0, 2, (200, 40)).astype(float)  # forty checkpoints as good as the base
    assert evaluate_smpo.win_rate_on_other_half(noise, 0) < noise.mean(axis=0).max() - 0.02


def test_many_checkpoints_do_not_take_long():
    """One matrix of weights serves 41 models' 1,640 duels: two seconds, where a bootstrap for each took a minute."""
    rng, start = np.random.default_rng(0), time.monotonic()
    models = {f"model-{i}": rng.normal(size=(500, 1)) for i in range(41)}
    assert len(summarise({"r": models}, [None] * 500, seed=0)[1]) == 41 * 40
    assert time.monotonic() - start < 25


# Mistakes


def test_a_mistake_is_said_alone_and_before_anything_else(tmp_path, monkeypatch, capsys):
    script = ROOT / "evaluate_smpo.py"
    flags = evaluation_flags(tmp_path / "out", resolution=63, models=None, max_prompts=None)
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().err.splitlines() == [
        "evaluate_smpo.py: --resolution must be a multiple of 8, the VAE's factor, got 63.",
        "Give tuned models with --models, or a run with --run_dir.",
    ]


def test_names_and_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a boat\n")
    args = parsed(
        models=["smpo=~/runs/lr=1e-5/checkpoint-50", "~/runs/a=b/last"], prompts_path="~/prompts.txt",
        output_dir="~/out", reward_model="~/pick", pretrained_model_name_or_path="~/base",
    )  # fmt: skip
    assert args.models["smpo"] == f"{tmp_path}/runs/lr=1e-5/checkpoint-50"
    assert args.reward_model == {"pick": f"{tmp_path}/pick"}
    with pytest.raises(UserError, match="--output_dir .*demo.jpg is a file"):
        parsed(output_dir=TINY / "demo.jpg", dataset_name="x")
    reward = shutil.copytree(TINY / "pickscore", tmp_path / "reward")
    (reward / "model.safetensors").write_bytes((reward / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="--reward_model .*reward cannot be loaded: Error while deserializing header"):
        evaluate(tmp_path / "out", reward_model=reward)
    with pytest.raises(SystemExit):
        parsed(num_inference_steps=0)
    assert "--num_inference_steps: must be positive, got 0" in capsys.readouterr().err
    assert args.output_dir == f"{tmp_path}/out" and args.pretrained_model_name_or_path == f"{tmp_path}/base"


def test_a_comparison_is_of_thumbnails():
    images = [[Image.new("RGB", (1024, 512))] * 4] * 12
    assert evaluate_smpo.side_by_side(images, images, ["a"] * 12).size == (8 * 256, 12 * (128 + 23))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dataset_name": None}, "Give one of --prompts_path and --dataset_name"),
        ({"dataset_name": ""}, "--dataset_name is empty. Is a variable of the shell not set?"),
        ({"prompts_path": "/no/prompts.txt"}, "--prompts_path /no/prompts.txt is not a file"),
        ({"prompts_path": TINY / "demo.jpg"}, "demo.jpg is not a file that ends in .txt, .json, .jsonl, .csv"),
        ({"models": None, "blind": True, "pairs_path": "x.parquet"}, "Give tuned models with --models"),
        ({"models": None}, "Give tuned models with --models, or a run with --run_dir"),
        ({"reward_model": ["a/x", "b/x"]}, "--reward_model b/x: 'x' cannot name it"),
        ({"reward_model": "seed=x"}, "--reward_model seed=x: 'seed' cannot name it"),
        ({"reward_model": "aesthetic=/no/head.pth"}, "(?s)--reward_model /no/head.pth cannot be loaded.*: pick"),
        ({"reward_model": f"aesthetic={TINY / 'demo.jpg'}"}, "(?s)--reward_model .*demo.jpg cannot be loaded"),
        ({"reward_model": "clip", "pairs_path": "pairs.parquet"}, "--pairs_path needs --score_range .*by clip"),
        ({"models": ["base=x"]}, "'base' cannot name it"),
        ({"models": ["a=x", "a=y"]}, "'a' cannot name it"),
        ({"models": ["mine=/no/such"]}, "(?s)--models /no/such cannot be loaded.*a file or folder that exists"),
        ({"models": [f"mine={TINY / 'pairs'}"]}, "(?s)--models mine=.*pairs holds test.parquet, .*a pipeline, UNet"),
        ({"models": [f"mine={TINY / 'judge.safetensors'}"]}, "--models .*judge.safetensors cannot be loaded: "),
        ({"pretrained_model_name_or_path": TINY / "judge.safetensors"}, "no pipeline: .*.from_single_file"),
        ({"models": [f"mine={TINY / 'sd15' / 'vae'}"]}, "--models .*vae cannot be loaded: "),
        ({"dataset_name": ROOT / "README.md"}, "README.md is a file: give it to --prompts_path"),
        ({"pretrained_model_name_or_path": "no/such"}, "--pretrained_model_name_or_path no/such cannot be loaded"),
        ({"reward_model": "no/such"}, "--reward_model no/such cannot be loaded"),
        ({"caption_column": "text"}, "--caption_column text"),
        ({"guidance_scale": math.inf}, "--guidance_scale must be finite, got inf"),
        ({"pairs_path": "x.parquet", "models": None}, "--pairs_path needs two images of a prompt: give --num_images"),
        ({"pairs_path": "pairs.csv"}, "--pairs_path pairs.csv must end in .parquet"),
        ({"score_range": [1, 0]}, "--score_range must be a MIN and a larger MAX, got 1.0 0.0"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
        ({"reward_model": TINY / "sd15" / "text_encoder"}, "not a CLIP-style model"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, **flags)


def test_votes_know_their_evaluation(tmp_path):
    """Two evaluations have the same places, and no name in common."""
    names = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for image in ("base.png", "tuned.png"):
            (tmp_path / folder / image).write_bytes(folder.encode())  # base and tuned alike
            names.add(evaluate_smpo.blind_name(image, argparse.Namespace(output_dir=tmp_path / folder)))
    assert len(names) == 4


# Pairs


def test_pairs_are_what_training_takes(damaged, tmp_path):
    """Two models, two images a prompt, two rewards: columns, labels in closed form, and two steps on them."""
    pairs = tmp_path / "pairs.parquet"
    rewards = [TINY / "pickscore", f"other={TINY / 'pickscore'}"]
    flags = {"models": f"damaged={damaged}", "num_images_per_prompt": 2, "pairs_path": pairs, "reward_model": rewards}
    evaluate(tmp_path / "out", **flags, pairs="all", score_range=[-0.5, 0.5])
    rows, scores = pq.read_table(pairs).to_pylist(), read_table(tmp_path / "out" / "scores.csv")
    score_of = {(row["prompt"], row["model"], row["seed"]): float(row["pickscore"]) for row in scores}
    file_of = {(row["prompt"], row["model"], row["seed"]): tmp_path / "out" / row["image"] for row in scores}
    assert len(rows) == 3 * 6 == len({row["ranking_id"] for row in rows})  # 4 choose 2
    for row in rows:
        keys = [(row["caption"], row[f"model_{i}"], str(row[f"seed_{i}"])) for i in (0, 1)]
        first, second = (score_of[key] for key in keys)
        assert (row["score_0_pickscore"], row["score_1_pickscore"], row["score_0_other"]) == (first, second, first)
        assert row["soft_label_0"] == pytest.approx(1 / (1 + math.exp((second - first) / 100)), rel=1e-12)
        assert (row["label_0"], row["label_1"]) == (float(first > second), float(second > first))
        assert [row["jpg_0"], row["jpg_1"]] == [file_of[key].read_bytes() for key in keys]
        assert [row["image_0_uid"], row["image_1_uid"]] == [
            hashlib.sha256(row[name]).hexdigest() for name in ("jpg_0", "jpg_1")
        ]
    assert 0 < sum(row["label_0"] for row in rows) < 18  # the order says nothing
    assert len(train(tmp_path / "trained", dataset_name=pairs, noising="forward", rank=2)["loss"]) == 2

    pairs.unlink()
    published = parse_args(evaluation_flags(tmp_path, reward_model="pickscore", pairs_path=pairs)).score_range
    evaluate(tmp_path / "out", **flags, score_range=list(published))
    again = pq.read_table(pairs).to_pylist()
    assert [row["caption"] for row in again] == list(dict.fromkeys(row["caption"] for row in rows))
    for row in again:
        of_prompt = [score for (prompt, *_), score in score_of.items() if prompt == row["caption"]]
        assert {row["score_0_pickscore"], row["score_1_pickscore"]} == {min(of_prompt), max(of_prompt)}
        gap = row["score_0_pickscore"] - row["score_1_pickscore"]
        width = 0.28201571106910706 - 0.11543526500463486
        assert row["soft_label_0"] == pytest.approx(1 / (1 + math.exp(-gap / 100 / width)), rel=1e-9)
    with pytest.raises(UserError, match="--pairs_path .*pairs.parquet exists: move it away"):
        evaluate(tmp_path / "out", **flags, score_range=list(published))


def test_pairs_of_the_base_alone_and_of_images_that_do_not_differ(tmp_path):
    pairs, flags = tmp_path / "pairs.parquet", {"score_range": [-1, 1]}
    assert list(evaluate(tmp_path / "out", models=None, num_images_per_prompt=2, pairs_path=pairs, **flags)) == [
        "base"
    ]
    assert len(pq.read_table(pairs)) == 3
    with pytest.raises(UserError, match="--pairs_path .*stays unwritten: of no prompt do two images differ"):
        evaluate(tmp_path / "same", pairs_path=tmp_path / "none.parquet", **flags)
    assert not (tmp_path / "none.parquet").exists() and (tmp_path / "same" / "results.md").is_file()
