"""The tiny models and data are what they claim to be."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from judge import Judge
from make_pairs import DAMAGED, SCHEMA, SOURCES
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor
from world import ATTRIBUTES, caption, random_scenes, random_vividness, render

from diffusers import DDIMScheduler, StableDiffusionPipeline
from relabel_pickapic import embed_images, embed_texts


@pytest.fixture(scope="module")
def judge():
    judge = Judge()
    judge.load_state_dict(load_file(TINY / "judge.safetensors"))
    return judge


def test_size_and_precision():
    files = [*TINY.rglob("*.safetensors"), *TINY.rglob("*.parquet")]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    for path in TINY.rglob("*.safetensors"):
        dtypes = {value.dtype for value in load_file(path).values()}
        assert dtypes <= {torch.float16, torch.int64} and torch.float16 in dtypes, path


def test_pairs_have_the_schema_and_the_faults_of_pick_a_pic():
    train, test = (pq.read_table(TINY / "pairs" / f"{split}.parquet") for split in ("train", "test"))
    for table in (train, test):
        assert table.schema.equals(SCHEMA)
        assert set(table["model_0"].to_pylist()) | set(table["model_1"].to_pylist()) <= set(SOURCES)
    assert not set(train["caption"].to_pylist()) & set(test["caption"].to_pylist())
    frame = train.drop(["jpg_0", "jpg_1"]).to_pandas()
    assert (frame.groupby("caption").size() == frame.groupby("caption").num_example_per_prompt.first()).all()
    assert frame.groupby("caption").size().max() == 3
    assert 0.05 < (frame.label_0 == 0.5).mean() < 0.4 and set(frame.label_0) == {0.0, 0.5, 1.0}
    uids = np.concatenate([frame.image_0_uid, frame.image_1_uid])
    assert len(set(uids)) < 0.6 * len(uids)  # the same image stands in several rows
    assert sum(jpg in DAMAGED for jpg in train["jpg_0"].to_pylist()) == 3  # the truncated ones look like images


def test_the_judge_reads_pictures(judge):
    generator = torch.Generator().manual_seed(5)
    scenes = random_scenes(256, generator)
    with torch.no_grad():
        log_probs, _ = judge(render(scenes, random_vividness(256, generator), generator))
    for i, log_prob in enumerate(log_probs):
        assert (log_prob.argmax(1) == scenes[:, i]).float().mean() > 0.9, i


def test_the_reward_model_prefers_the_right_caption():
    """A picture's own caption against one with an attribute changed. It learned all but where the shape stands."""
    model = CLIPModel.from_pretrained(TINY / "pickscore").float()
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    generator = torch.Generator().manual_seed(6)
    scenes = random_scenes(128, generator)
    pictures = render(scenes, random_vividness(128, generator), generator)
    pixels = processor.image_processor(images=list(pictures), do_rescale=False, return_tensors="pt")["pixel_values"]
    images = embed_images(model, pixels)

    def score(scenes):
        return (images * embed_texts(model, processor.tokenizer, [caption(scene) for scene in scenes])).sum(-1)

    right = score(scenes)
    for i, names in enumerate(ATTRIBUTES):
        if names[0] == "in the center":
            continue
        wrong = scenes.clone()
        wrong[:, i] = (wrong[:, i] + torch.randint(1, len(names), (128,), generator=generator)) % len(names)
        assert (right > score(wrong)).float().mean() > 0.75, i


def test_the_base_model_follows_its_prompts_in_part(judge):
    """Far above chance, and with room to win."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15").to(torch.float32)
    assert pipeline.vae_scale_factor == 8
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    scenes = random_scenes(64, generator)
    prompts = [caption(scene) for scene in scenes]
    pictures = pipeline(
        prompts, num_inference_steps=10, guidance_scale=2.0, height=64, width=64, generator=generator, output_type="pt"
    ).images
    with torch.no_grad():
        log_probs, vividness = judge(pictures)
    accuracy = [float((log_prob.argmax(1) == scenes[:, i]).float().mean()) for i, log_prob in enumerate(log_probs)]
    chance = [1 / len(names) for names in ATTRIBUTES]
    assert all(a > 1.4 * c for a, c in zip(accuracy, chance)), accuracy
    assert 0.5 < np.mean(accuracy) < 0.98 and 0.5 < vividness.mean() < 0.85
