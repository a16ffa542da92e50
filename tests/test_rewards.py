"""The reward models that have names give what their own packages give of random weights, see tests/originals."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, relabel, write_pairs
from PIL import Image
from random_checkpoint import TEXTS, images, tensor
from test_evaluate import evaluate, read_table
from test_relabel import metadata_of, scores_of
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
)

import evaluate_smpo
import relabel_pickapic as script


SCRIPTS = [script, evaluate_smpo]
ORIGINALS = ROOT / "tests" / "originals"
REFERENCE = json.loads((ORIGINALS / "reference.json").read_text())


def random_weights(name, prefix=""):
    """The tensors of the reference below a prefix, which is cut off."""
    shapes = {key: shape for key, shape in REFERENCE[name]["shapes"].items() if key.startswith(prefix)}
    weights = {key.removeprefix(prefix): torch.from_numpy(tensor(key, shape)) for key, shape in shapes.items()}
    return {key: value.long() if key.endswith("position_ids") else value for key, value in weights.items()}


def clip_config(hidden_act, width, layers, heads, text_width, text_layers, dim):
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers}
    text |= {"num_attention_heads": 4, "vocab_size": 597, "hidden_act": hidden_act}
    text |= {"bos_token_id": 595, "eos_token_id": 596, "pad_token_id": 596}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "patch_size": 8}
    vision |= {"num_attention_heads": heads, "image_size": 32, "hidden_act": hidden_act}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache as of the Hub, with small models in place of the published ones, at the commits that are pinned."""
    cache, pixels = tmp_path_factory.mktemp("hub"), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)

    def snapshot(name, commit, tokenizer=""):
        folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
        folder.mkdir(parents=True)
        for path in (TINY / "pickscore").glob("*") if tokenizer else ():
            if re.search(tokenizer, path.name):
                shutil.copy(path, folder)
        return folder

    words, everything = "token|vocab|merges|preprocessor", "."
    snapshot(*script.PUBLISHED["pickscore"], tokenizer=everything)
    clip_config("gelu", 48, 3, 4, 32, 2, 24).save_pretrained(snapshot(*script.CLIP_H, tokenizer=words))
    hpsv2 = snapshot(*script.PUBLISHED["hpsv2.1"])
    torch.save({"state_dict": random_weights("hpsv2.1")}, hpsv2 / "HPS_v2.1_compressed.pt")
    torch.save(random_weights("imagereward"), snapshot(*script.PUBLISHED["imagereward"]) / "ImageReward.pt")
    (cache / "vocab.txt").write_text("\n".join(REFERENCE["imagereward"]["vocab"]))
    bert = snapshot(*script.BERT)
    BertTokenizer(str(cache / "vocab.txt")).save_pretrained(bert)
    BertConfig().save_pretrained(bert)
    torch.save(random_weights("aesthetic", "mlp."), snapshot(*script.PUBLISHED["aesthetic"]) / "aesthetic-model.pth")

    clip_l = snapshot(*script.CLIP_L, tokenizer=words)
    clip_config("quick_gelu", 64, 2, 1, 32, 1, 32).save_pretrained(clip_l)
    weights = random_weights("aesthetic", "clip_model.")  # OpenAI's are open_clip's
    torch.save({"state_dict": weights}, cache / "clip.pt")
    source = {"pretrained_model_name_or_path": clip_l}
    script.load_hpsv2(cache / "clip.pt", None, source)[0].save_pretrained(clip_l)
    pixels.save_pretrained(clip_l)
    return cache


@pytest.fixture
def small(cache, monkeypatch):
    """The small models are found by the names of the published ones."""
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(REFERENCE["imagereward"]["vocab"]) + 2, "encoder_hidden_size": 48}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache), raising=False)  # of transformers 4
    for module in SCRIPTS:
        monkeypatch.setattr(module, "BLIP_VISION", BlipVisionConfig(**{**module.BLIP_VISION.to_dict(), **vision}))
        monkeypatch.setattr(module, "BLIP_TEXT", BlipTextConfig(**{**module.BLIP_TEXT.to_dict(), **text}))


def scorer_of(name, path=None, dtype="float32"):
    return script.load_reward(script.find_reward(name, str(path or name)), "cpu", dtype)


@pytest.mark.parametrize("name", ["hpsv2.1", "imagereward", "aesthetic"])
def test_scores_are_those_of_the_original_package(name, small):
    scorer = scorer_of(name)
    pixels = [scorer.image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images()]
    scores = scorer.score(torch.cat(pixels), TEXTS).numpy()
    np.testing.assert_allclose(scores, REFERENCE[name]["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", script.REWARDS)
def test_labels_of_a_published_reward(name, small, tmp_path):
    """The whole command, by a name or the repository: pins are used, PickScore has its published range."""
    reward, path = script.REWARDS[name], tmp_path / "labels.parquet"
    pairs = write_pairs(tmp_path / "pairs.parquet")
    relabel(dataset_name=pairs, reward_model=name, output_path=path, dataloader_num_workers=0)
    model, commit = script.PUBLISHED[name]
    args = script.parse_args(f"--dataset_name x --output_path x.parquet --reward_model {model}".split())
    assert args.reward_model == name
    metadata, scores = metadata_of(path), scores_of(path)
    assert (metadata["reward_model"], metadata["revision"]) == (model, commit)
    assert (metadata["reward_processor"], metadata["processor_revision"]) == reward.base
    ends = reward.label_range or (scores.min(), scores.max())
    assert (metadata["score_min"], metadata["score_max"]) == ends
    assert metadata["range_from"] == ("published labels" if name == "pickscore" else "the scores")


def test_an_evaluation_by_all_published_rewards(small, tmp_path):
    """Scores of images, times 100 where they are cosines, and pairs labelled with PickScore's published range."""
    pairs, names = tmp_path / "pairs.parquet", list(script.REWARDS)
    flags = {"reward_model": names, "models": None, "num_images_per_prompt": 2}
    evaluate(tmp_path, **flags, max_prompts=2, pairs_path=pairs)
    record = json.loads((tmp_path / "results.json").read_text())
    found = {name: (record["rewards"][name]["reward_model"], record["rewards"][name]["revision"]) for name in names}
    assert found == script.PUBLISHED
    rows = read_table(tmp_path / "scores.csv")
    for name in names:
        scorer = scorer_of(name)
        files = [Image.open(tmp_path / row["image"]).convert("RGB") for row in rows]
        pixels = torch.cat([scorer.image_processor(image, return_tensors="pt")["pixel_values"] for image in files])
        scores = script.REWARDS[name].scale * scorer.score(pixels, [row["prompt"] for row in rows])
        np.testing.assert_allclose([row[name] for row in rows], scores, rtol=0, atol=1e-4)
    for pair in pq.read_table(pairs).to_pylist():
        gap = (pair["score_0_pickscore"] - pair["score_1_pickscore"]) / 100
        p_0 = 1 / (1 + np.exp(-gap / (0.28201571106910706 - 0.11543526500463486)))
        assert pair["soft_label_0"] == pytest.approx(p_0, rel=1e-9)


def test_a_published_reward_from_a_folder_or_file(cache, small, tmp_path):
    """NAME=PATH is of NAME's kind: of a file what it goes with is the pinned one, of a folder what lies there."""
    name, commit = script.PUBLISHED["aesthetic"]
    head = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit / "aesthetic-model.pth"
    source = script.find_reward("aesthetic", str(head))
    assert (source["reward_processor"], source["processor_revision"]) == script.CLIP_L
    config, _ = script.locate_file(script.CLIP_L[0], "config.json", script.CLIP_L[1])
    shutil.copytree(Path(config).parent, tmp_path / "all")
    shutil.copy(head, tmp_path / "all")
    whole = script.find_reward("aesthetic", str(tmp_path / "all"))
    assert whole["reward_processor"] == str(tmp_path / "all") and whole["revision"] is None
    pixels = torch.rand(2, 3, 32, 32)
    first, second = (scorer_of("aesthetic", path) for path in (head, tmp_path / "all"))
    assert torch.equal(first.score(pixels, ["", ""]), second.score(pixels, ["", ""]))


@pytest.mark.parametrize("name, weights, message", [
    ("aesthetic", {"layers.3.weight": torch.zeros(2, 2), "layers.0.weight": torch.zeros(1024, 32)}, "3.weight"),
    ("imagereward", {"blip.visual_encoder.cls_token": torch.zeros(1, 1, 48)}, "no BlipTextModel of this size"),
    ("hpsv2.1", {"epoch": 1}, "state_dict"),
])  # fmt: skip
def test_other_weights_are_refused(name, weights, message, small, tmp_path):
    file = tmp_path / script.REWARDS[name].file
    torch.save(weights, file)
    message = f"(?s)--reward_model {re.escape(str(file))} cannot be loaded.*{message}"
    with pytest.raises(script.UserError, match=message):
        scorer_of(name, file)


def test_a_reward_that_is_nowhere():
    with pytest.raises(script.UserError, match="(?s)--reward_model /no/folder .*Accepted: pickscore, hpsv2.1"):
        script.find_reward("imagereward", "/no/folder")


@pytest.mark.parametrize("own", ["", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_with_a_tokenizer_prepares_images_its_own_way(own, small, tmp_path):
    """One that has none is prepared for as PickScore is."""
    words = shutil.ignore_patterns("*token*", "*vocab*", "*merg*")
    shutil.copytree(TINY / "pickscore", tmp_path / "model", ignore=words)
    if own:
        AutoTokenizer.from_pretrained(TINY / "pickscore").save_pretrained(tmp_path / "words")
        for name in {own, "tokenizer.json"}:
            shutil.copy(tmp_path / "words" / name, tmp_path / "model")
    source = script.find_reward("model", str(tmp_path / "model"))
    assert source["reward_processor"] == (str(tmp_path / "model") if own else script.CLIP_H[0])
    assert scorer_of("model", tmp_path / "model").score(torch.rand(1, 3, 64, 64), ["a red circle"]).isfinite().all()


@pytest.mark.parametrize("pad", [False, True])
def test_pixels_are_those_of_torchvision(pad):
    with np.load(ORIGINALS / "pixels.npz") as pixels:
        for i, image in enumerate(images()):
            found = script.SquareProcessor(14, pad)(images=image, return_tensors="pt")["pixel_values"][0]
            np.testing.assert_allclose(found, pixels[f"{'pad' if pad else 'crop'}{i}"], rtol=0, atol=1e-5)


def test_image_reward_has_the_sizes_of_the_original():
    with torch.device("meta"):
        vision, text = BlipVisionModel(script.BLIP_VISION), BlipTextModel(script.BLIP_TEXT, add_pooling_layer=False)
    for model, name in ((vision, "visual_encoder"), (text, "text_encoder")):
        sizes = [parameter.numel() for parameter in model.parameters()]
        assert [len(sizes), sum(sizes), model.config.num_attention_heads] == REFERENCE["imagereward"]["full"][name]


@pytest.mark.parametrize("name", ["aesthetic", "imagereward"])
def test_a_head_is_not_rounded(name, small):
    """Its weights in half precision are those in fp32; those of the network before it are not."""
    half, full = (scorer_of(name, dtype=dtype).model for dtype in ("bfloat16", "float32"))
    for parameter, same in zip(half.head.parameters(), full.head.parameters(), strict=True):
        assert torch.equal(parameter, same)
    assert next(half.parameters()).dtype == torch.bfloat16
