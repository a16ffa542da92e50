"""relabel_pickapic.py on the tiny pairs and on damaged ones."""

import io
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, assert_same_labels, command_line, relabel, split_pairs
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import relabel_pickapic
from relabel_pickapic import Batches, ImageTasks, decode_image, first_places, parse_args


def test_labels_of_the_tiny_pairs(labels_path):
    pairs, labels = pq.read_table(TINY / "pairs" / "train.parquet"), pq.read_table(labels_path)
    assert labels.column_names == [
        "image_0_uid", "image_1_uid", "ranking_id", "label_0", "score_0", "score_1", "soft_label_0", "valid",
        "invalid_reason",
    ]  # fmt: skip
    for key in ("image_0_uid", "image_1_uid", "ranking_id", "label_0"):  # one row a source row, in its order
        assert labels[key].to_pylist() == pairs[key].to_pylist()

    metadata = json.loads(pq.read_schema(labels_path).metadata[b"smpo_labels"])
    scores = np.stack([labels["score_0"].to_numpy(), labels["score_1"].to_numpy()]).astype(np.float64)
    (reward,) = metadata["rewards"]
    assert reward["score_min"] == np.nanmin(scores) and reward["score_max"] == np.nanmax(scores)
    assert reward["name"] == "pickscore" and reward["weight"] == 1
    assert metadata["num_rows"] == len(pairs) and metadata["num_invalid"] == 5
    assert metadata["range_from"] == "the scores" and metadata["dataset_split_name"] == "train"

    normalised = (scores - np.nanmin(scores)) / (np.nanmax(scores) - np.nanmin(scores))
    soft = np.exp(normalised[0]) / np.exp(normalised).sum(axis=0)
    valid = labels["valid"].to_numpy()
    np.testing.assert_allclose(labels["soft_label_0"].to_numpy()[valid], soft[valid], rtol=1e-5)
    # The damaged rows, and no others, have no label; their other image is still scored.
    assert np.array_equal(~valid, np.isnan(scores[0])) and not np.isnan(scores[1]).any()
    assert labels["soft_label_0"].is_null().to_numpy().tolist() == (~valid).tolist()


def test_scores_are_the_models_cosines(labels_path):
    """Against transformers' own forward pass, one pair at a time."""
    pairs, labels = pq.read_table(TINY / "pairs" / "train.parquet"), pq.read_table(labels_path)
    model = CLIPModel.from_pretrained(TINY / "pickscore").float()
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    for row in np.flatnonzero(labels["valid"].to_numpy())[:8]:
        images = [Image.open(io.BytesIO(pairs[f"jpg_{i}"][int(row)].as_py())) for i in (0, 1)]
        inputs = processor(text=[pairs["caption"][int(row)].as_py()], images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model(**inputs)
        cosines = out.logits_per_image[:, 0] / model.logit_scale.detach().exp()
        ours = [labels[f"score_{i}"][int(row)].as_py() for i in (0, 1)]
        np.testing.assert_allclose(ours, cosines.numpy(), atol=2e-6)


def test_the_tiny_reward_model_ranks_as_people_do(labels_path):
    labels = pq.read_table(labels_path).to_pandas()
    decided = labels[labels.valid & (labels.label_0 != 0.5)]
    agreement = ((decided.soft_label_0 > 0.5) == (decided.label_0 > 0.5)).mean()
    assert agreement > 0.7, agreement


def test_preprocessing_is_the_processors_own():
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    rng = np.random.default_rng(0)
    for size in [(512, 512), (640, 448), (768, 1024), (100, 300)]:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        task = (None, 0, [(encoded(image, "PNG"), encoded(image, "JPEG"))], np.array([[True, False]]))
        result = ImageTasks([processor], torch.float32)[task]
        assert torch.equal(result["pixels"][0], processor(images=image, return_tensors="pt")["pixel_values"])
        assert result["places"].tolist() == [0] and not result["problems"]
        assert result["hashes"][0, 0] != result["hashes"][0, 1]  # bytes, not pixels


def test_first_places():
    rng = np.random.default_rng(0)
    for keys in (rng.integers(-3, 4, (1, 50)), rng.integers(-3, 4, (2, 200)), np.full((2, 5), 2**62)):
        columns = list(zip(*keys.tolist()))
        assert first_places(*keys).tolist() == [columns.index(column) for column in columns]


def test_each_image_and_each_caption_is_scored_once(labels_path, tmp_path, monkeypatch):
    texts, num_images = [], 0
    embed_texts, embed_images = relabel_pickapic.embed_texts, relabel_pickapic.embed_images

    def count_texts(model, processor, batch):
        texts.extend(batch)
        return embed_texts(model, processor, batch)

    def count_images(model, batch):
        nonlocal num_images
        num_images += len(batch)
        return embed_images(model, batch)

    monkeypatch.setattr(relabel_pickapic, "embed_texts", count_texts)
    monkeypatch.setattr(relabel_pickapic, "embed_images", count_images)
    shards = split_pairs(tmp_path / "shards", 20)
    relabel(dataset_name=shards / "*.parquet", output_path=tmp_path / "labels.parquet", batch_size=48)
    pairs = pq.read_table(TINY / "pairs" / "train.parquet").to_pandas()
    images = {(uid, row.caption) for row in pairs.itertuples() for uid in (row.image_0_uid, row.image_1_uid)}
    num_damaged = len({row.image_0_uid for row in pairs.itertuples() if not decodes(row.jpg_0)})
    assert num_images == len(images) - num_damaged < 1.2 * len(pairs)
    assert sorted(texts) == sorted(set(pairs.caption))
    assert_same_labels(tmp_path / "labels.parquet", labels_path, atol=1e-6)


def test_published_range_and_batch_size_leave_the_scores_alone(labels_path, tmp_path):
    relabel(output_path=tmp_path / "labels.parquet", batch_size=7, score_min=0.1, score_max=0.3)
    ours, theirs = pq.read_table(tmp_path / "labels.parquet"), pq.read_table(labels_path)
    for i in (0, 1):
        a, b = (table[f"score_{i}"].to_numpy().astype(np.float64) for table in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-6)
    gap = (ours["score_0"].to_numpy() - ours["score_1"].to_numpy()).astype(np.float64) / 0.2
    np.testing.assert_allclose(ours["soft_label_0"].to_numpy(), 1 / (1 + np.exp(-gap)), rtol=1e-5)
    metadata = json.loads(ours.schema.metadata[b"smpo_labels"])
    assert metadata["range_from"] == "the command line" and metadata["rewards"][0]["score_max"] == 0.3


def test_other_column_names_and_a_folder_of_images(labels_path, tmp_path):
    """A data set that knows its columns as `datasets.Image`, has other names and no ranking id, saved to disk."""
    table = pq.read_table(TINY / "pairs" / "train.parquet").slice(0, 20)
    names = {"jpg_0": "left", "jpg_1": "right", "caption": "prompt", "image_0_uid": "a", "image_1_uid": "b"}
    data = datasets.Dataset(table.select(list(names))).rename_columns(names)
    data = data.filter(lambda row: row["left"] and len(row["left"]) > 600)
    data = data.cast_column("left", datasets.Image()).cast_column("right", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    relabel(
        dataset_name=tmp_path / "saved", output_path=tmp_path / "labels.parquet", image_0_column="left",
        image_1_column="right", caption_column="prompt", image_0_uid_column="a", image_1_uid_column="b",
    )  # fmt: skip
    labels = pq.read_table(tmp_path / "labels.parquet").to_pandas()
    assert list(labels.columns[:2]) == ["image_0_uid", "image_1_uid"] and "ranking_id" not in labels
    expected = pq.read_table(labels_path).to_pandas().set_index(["image_0_uid", "image_1_uid"])
    for row in labels.itertuples():
        assert row.score_0 == pytest.approx(expected.loc[(row.image_0_uid, row.image_1_uid)].score_0, abs=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"score_min": 0.1}, "--score_min and --score_max need each other"),
        ({"score_min": 0.3, "score_max": 0.1}, "must be less than"),
        ({"batch_size": 0}, "--batch_size must be positive, got 0"),
        ({"output_path": "labels.csv"}, "must end in .parquet"),
        ({"caption_column": "prompt"}, "--caption_column prompt.*It has .*caption"),
        ({"image_0_uid_column": "uid"}, "--image_0_uid_column uid"),
        (
            {"dataset_name": "no/such/set"},
            r"(?s)--dataset_name no/such/set .* cannot be loaded.*Accepted: a Hub name, a folder, a Parquet",
        ),
        ({"reward_model": ["a/b", "c/b"]}, "--reward_model c/b: 'b' cannot name it, as it is taken"),
        ({"reward_weights": [1, 2]}, "--reward_weights has 2 values for 1 reward models"),
        ({"reward_weights": [-1]}, "--reward_weights must be finite and not negative, got -1"),
        ({"reward_weights": [0]}, "--reward_weights are all zero"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must not be negative"),
        ({"dataset_name": None}, "one of --dataset_name and --scores_from"),
        (
            {"scores_from": "none.parquet"},
            "(?s)one of --dataset_name and.*none.parquet is not a file.*--reward_model has no",
        ),
        ({"hub_dataset_id": "a/b"}, "--hub_token and --hub_dataset_id do nothing without --push_to_hub"),
        ({"with_images": TINY / "pairs" / "test.parquet"}, "--with_images .*test.parquet is not a folder"),
        ({"reward_model": TINY / "sd15" / "text_encoder"}, "is a .*, not a CLIP-style model"),
        ({"reward_model": "/no/such/model"}, "(?s)--reward_model /no/such/model cannot be loaded"),
        ({"dataset_split_name": "validation"}, "--dataset_split_name validation cannot be loaded"),
        ({"image_0_column": "caption"}, "--image_0_column caption holds string, not encoded images"),
        ({"caption_column": "label_0"}, "--caption_column label_0 holds double, not texts"),
        ({"human_label_column": "caption"}, "--human_label_column caption holds string, not numbers"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        relabel(**{"output_path": tmp_path / "labels.parquet", **flags})
    assert not list(tmp_path.glob("*.p*"))


def test_labels_are_never_overwritten(tmp_path):
    path = tmp_path / "labels.parquet"
    path.write_text("labels that took a day")
    with pytest.raises(ValueError, match="exists: move it away"):
        parse_args(["--dataset_name", "x", "--output_path", str(path)])


# Several rewards


@pytest.fixture(scope="module")
def other_reward(tmp_path_factory):
    """A CLIP of another size, with random weights, that looks at 32 pixels."""
    folder = tmp_path_factory.mktemp("other")
    config = CLIPConfig.from_pretrained(TINY / "pickscore")
    config.vision_config.image_size, config.vision_config.hidden_size, config.projection_dim = 32, 48, 24
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    processor.image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(folder)
    return folder


def test_several_rewards_and_their_mix(other_reward, labels_path, tmp_path):
    models = [f"pick={TINY / 'pickscore'}", f"other={other_reward}"]
    relabel(reward_model=models, reward_weights=[3, 1], output_path=tmp_path / "both.parquet")
    relabel(reward_model=other_reward, output_path=tmp_path / "other.parquet")
    both, pick, other = (
        pq.read_table(path) for path in (tmp_path / "both.parquet", labels_path, tmp_path / "other.parquet")
    )
    assert both.column_names[4:9] == ["score_0_pick", "score_1_pick", "score_0_other", "score_1_other", "soft_label_0"]
    gaps = []
    for name, alone in (("pick", pick), ("other", other)):
        scores = np.stack([both[f"score_{i}_{name}"].to_numpy() for i in (0, 1)]).astype(np.float64)
        for i in (0, 1):
            np.testing.assert_array_equal(scores[i], alone[f"score_{i}"].to_numpy())
        gaps.append((scores[0] - scores[1]) / (np.nanmax(scores) - np.nanmin(scores)))
    expected = 1 / (1 + np.exp(-(0.75 * gaps[0] + 0.25 * gaps[1])))
    np.testing.assert_allclose(both["soft_label_0"].to_numpy(), expected, rtol=1e-5)
    rewards = json.loads(both.schema.metadata[b"smpo_labels"])["rewards"]
    assert [(reward["name"], reward["weight"]) for reward in rewards] == [("pick", 0.75), ("other", 0.25)]
    assert rewards[1]["reward_model"] == str(other_reward)

    # New weights and ranges from the raw scores alone, without data and model.
    flags = {"reward_weights": [0, 1], "score_min": [-1, -0.5], "score_max": [1, 0.5]}
    relabel_pickapic.main(parse_args(command_line(
        scores_from=tmp_path / "both.parquet", output_path=tmp_path / "again.parquet", **flags
    )))  # fmt: skip
    again = pq.read_table(tmp_path / "again.parquet")
    assert again.column_names == both.column_names and again["score_0_pick"].equals(both["score_0_pick"])
    gap = both["score_0_other"].to_numpy().astype(np.float64) - both["score_1_other"].to_numpy()
    np.testing.assert_allclose(again["soft_label_0"].to_numpy(), 1 / (1 + np.exp(-gap)), rtol=1e-5)
    with pytest.raises(ValueError, match="--reward_weights has 1 values, and .* the scores of 2 reward models"):
        relabel_pickapic.main(parse_args(command_line(
            scores_from=tmp_path / "both.parquet", output_path=tmp_path / "3.parquet", reward_weights=[1]
        )))  # fmt: skip


def test_labels_from_scores_are_those_of_a_run_with_the_range(labels_path, tmp_path):
    flags = {"score_min": 0.1, "score_max": 0.3}
    relabel(output_path=tmp_path / "scored.parquet", **flags)
    args = command_line(scores_from=labels_path, output_path=tmp_path / "taken.parquet", **flags)
    relabel_pickapic.main(parse_args(args))
    assert (tmp_path / "scored.parquet").read_bytes() == (tmp_path / "taken.parquet").read_bytes()


def test_scores_come_from_labels_files_only(tmp_path):
    with pytest.raises(ValueError, match="(?s)--scores_from .*train.parquet cannot be loaded: .*lack smpo_labels"):
        relabel_pickapic.main(parse_args(command_line(
            scores_from=TINY / "pairs" / "train.parquet", output_path=tmp_path / "labels.parquet"
        )))  # fmt: skip


# Rows that are not as they should be


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_images_and_captions_of_every_kind(tmp_path):
    """What can be seen is scored, what cannot has no label, a reason and a count."""
    image = decode_image(pq.read_table(TINY / "pairs" / "test.parquet")["jpg_0"][0].as_py())
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = image.copy()
    clear.putalpha(255)
    good = {
        "CMYK": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "palette": encoded(image.convert("P"), "PNG"),
        "alpha": encoded(clear, "PNG"),
        "animated": encoded(image, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)], lossless=True),
        "turned": encoded(image.rotate(90, expand=True), "PNG", exif=exif),
        "16 bit": encoded(Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16)), "PNG"),
    }
    whole = encoded(image, "JPEG")
    bad = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "null": None,
        "no image": b"an essay",
        "bomb": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    }
    images = {"plain": encoded(image, "PNG"), **good, **bad}
    pairs = {
        "jpg_0": list(images.values()),
        "jpg_1": [encoded(image.convert("L"), "PNG")] * len(images),
        "caption": ["a large red circle"] * len(images),
        "image_0_uid": list(images),
        "image_1_uid": ["grey"] * len(images),
    }
    for caption in (None, "", "word " * 200):
        for name, value in zip(pairs, (images["plain"], images["plain"], caption, f"caption {caption}", "grey")):
            pairs[name].append(value)
    pairs = pa.table({**pairs, "jpg_0": pa.array(pairs["jpg_0"], pa.binary())})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    relabel(dataset_name=tmp_path / "pairs.parquet", output_path=tmp_path / "labels.parquet", dataloader_num_workers=2)

    rows = {row["image_0_uid"]: row for row in rows_of(tmp_path / "labels.parquet")}
    for name in ("alpha", "animated", "turned"):  # the same picture
        assert rows[name]["score_0"] == pytest.approx(rows["plain"]["score_0"], abs=1e-6)
    for name in ("CMYK", "palette"):
        assert rows[name]["score_0"] == pytest.approx(rows["plain"]["score_0"], abs=0.2)
    assert all(rows[name]["valid"] and rows[name]["invalid_reason"] is None for name in good)
    for name in bad:
        row = rows[name]
        assert (
            row["score_0"] is None and row["score_1"] is not None and row["soft_label_0"] is None and not row["valid"]
        )
        assert row["invalid_reason"].startswith("image 0: not a readable image (")
    assert "DecompressionBomb" in rows["bomb"]["invalid_reason"]
    assert rows["caption None"]["invalid_reason"] == "no caption" and rows["caption None"]["score_1"] is None
    assert rows["caption "]["valid"] and rows[f"caption {'word ' * 200}"]["valid"]
    metadata = json.loads(pq.read_schema(tmp_path / "labels.parquet").metadata[b"smpo_labels"])
    assert metadata["invalid"] == {"no caption": 1, "not a readable image": 5, "not finite": 0}
    assert metadata["num_valid"] == len(rows) - 6

    model, processor = (
        CLIPModel.from_pretrained(TINY / "pickscore").float(),
        CLIPProcessor.from_pretrained(TINY / "pickscore"),
    )
    inputs = processor(text=["word " * 200], images=[image], return_tensors="pt", truncation=True, max_length=77)
    with torch.no_grad():
        cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert rows[f"caption {'word ' * 200}"]["score_0"] == pytest.approx(cosine.item(), abs=2e-6)


def test_one_uid_with_other_bytes_is_another_image(tmp_path):
    """Damaged bytes where a uid first occurs do not spoil the good ones after them, nor do two images share a score."""
    pairs = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 12).to_pylist()
    for i, row in enumerate(pairs):
        row["caption"] = pairs[0]["caption"]
        row["image_0_uid"], row["image_1_uid"] = f"uid {i % 4}", None
    pairs[1]["jpg_0"] = pairs[1]["jpg_0"][:300]
    pairs[9]["jpg_0"] = pairs[5]["jpg_0"]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "shared.parquet")
    for i, row in enumerate(pairs):
        row["image_0_uid"], row["image_1_uid"] = f"left {i}", f"right {i}"
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "distinct.parquet")
    for name in ("shared", "distinct"):
        relabel(dataset_name=tmp_path / f"{name}.parquet", output_path=tmp_path / name / "labels.parquet")
    shared, distinct = (rows_of(tmp_path / name / "labels.parquet") for name in ("shared", "distinct"))
    for one, other in zip(shared, distinct):
        assert one["valid"] == other["valid"] and one["invalid_reason"] == other["invalid_reason"]
        if one["valid"]:
            assert one["score_0"] == pytest.approx(other["score_0"], abs=1e-6)
            assert one["score_1"] == pytest.approx(other["score_1"], abs=1e-6)
    assert [row["valid"] for row in shared] == [i != 1 for i in range(12)]
    assert shared[5]["score_0"] == shared[9]["score_0"]


def test_a_score_that_is_not_finite_has_no_label(tmp_path):
    """A model that answers NaN to one word."""
    shutil.copytree(TINY / "pickscore", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    (token,) = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    (name,) = [name for name in weights if name.endswith("token_embedding.weight")]
    weights[name][token] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    relabel(reward_model=tmp_path / "model", output_path=tmp_path / "labels.parquet")
    captions = pq.read_table(TINY / "pairs" / "train.parquet")["caption"].to_pylist()
    rows = rows_of(tmp_path / "labels.parquet")
    red = [token in processor.tokenizer(caption)["input_ids"] for caption in captions]
    assert 0 < sum(red) < len(rows)
    for row, is_red in zip(rows, red):
        if is_red:
            assert row["score_1"] is None and "image 1: the score is not finite" in row["invalid_reason"]
        else:
            assert row["score_1"] is not None
    metadata = json.loads(pq.read_schema(tmp_path / "labels.parquet").metadata[b"smpo_labels"])
    assert metadata["invalid"]["not finite"] == sum(red)


def test_batches_shrink_until_they_fit():
    """With real failures to allocate memory."""
    PartialState()  # for the log
    batches, sizes = Batches(64), []

    def embed(inputs):
        torch.empty(2**50 if len(inputs) > 10 else 1, dtype=torch.uint8)
        sizes.append(len(inputs))
        return inputs * 2

    inputs = torch.arange(100)
    assert torch.equal(batches(embed, inputs), inputs * 2)
    assert sizes == [8] * 12 + [4] and batches.size == 8
    with pytest.raises(RuntimeError, match="another error"):
        batches(lambda inputs: (_ for _ in ()).throw(RuntimeError("another error")), inputs)


# What is written


def test_the_labels_file_is_fit_for_few_rows(labels_path):
    file = pq.ParquetFile(labels_path)
    column = file.metadata.row_group(0).column(file.schema_arrow.names.index("soft_label_0"))
    assert column.has_offset_index and column.has_column_index and column.compression == "ZSTD"
    assert not labels_path.with_suffix(".scores").exists()
    assert Image.open(labels_path.with_suffix(".png")).size == (1200, 420)


def test_a_copy_with_images(labels_path, tmp_path):
    """Parquet files like the source's that `datasets` reads, with the labels beside the images; finished ones are kept."""
    shards, copy = split_pairs(tmp_path / "shards", 200), tmp_path / "copy"
    flags = {"dataset_name": shards / "*.parquet", "with_images": copy}
    relabel(output_path=tmp_path / "labels.parquet", **flags)
    names = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert sorted(path.name for path in copy.iterdir()) == names
    data = datasets.load_dataset(str(copy), split="train", cache_dir=tmp_path / "cache")
    pairs = pq.read_table(TINY / "pairs" / "train.parquet")
    labels = pq.read_table(tmp_path / "labels.parquet")
    for column in pairs.column_names:
        assert data.with_format("arrow")[:][column].to_pylist() == pairs[column].to_pylist()
    for column in ("score_0", "score_1", "soft_label_0", "valid", "invalid_reason"):
        assert data.with_format("arrow")[:][column].to_pylist() == labels[column].to_pylist()

    before = (copy / names[1]).stat().st_mtime_ns
    (copy / names[0]).unlink()
    relabel(output_path=tmp_path / "labels-2.parquet", **flags)
    assert (copy / names[0]).is_file() and (copy / names[1]).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="train-00000-of-00003.parquet exists, with other labels"):
        relabel(output_path=tmp_path / "labels-3.parquet", score_min=0, score_max=1, **flags)
    with pytest.raises(ValueError, match="--with_images adds the column score_0, which the data set has already"):
        relabel(dataset_name=copy, with_images=tmp_path / "more", output_path=tmp_path / "labels-4.parquet")
    assert not (tmp_path / "labels-4.scores").exists()  # nothing was scored first


def test_a_copy_of_a_data_set_in_arrow(tmp_path):
    """`datasets.Image` columns stay such, and the rows of a data set with a selection are its own."""
    data = datasets.load_dataset("parquet", data_files=str(TINY / "pairs" / "test.parquet"), split="train")
    data = data.cast_column("jpg_0", datasets.Image()).select([5, 3, 8, 0])
    data.save_to_disk(tmp_path / "saved")
    relabel(dataset_name=tmp_path / "saved", output_path=tmp_path / "labels.parquet", with_images=tmp_path / "copy")
    copy = datasets.load_dataset(str(tmp_path / "copy"), split="train", cache_dir=tmp_path / "cache")
    assert isinstance(copy.features["jpg_0"], datasets.Image) and copy.features["soft_label_0"].dtype == "float32"
    assert (
        copy["ranking_id"][:]
        == data["ranking_id"][:]
        == [row["ranking_id"] for row in rows_of(tmp_path / "labels.parquet")]
    )
    assert [image.tobytes() for image in copy["jpg_0"]] == [image.tobytes() for image in data["jpg_0"]]


# Images


def decodes(data):
    try:
        return decode_image(data) is not None
    except ValueError:
        return False


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_decode_image_in_every_mode():
    red = Image.new("RGB", (8, 6), (255, 0, 0))
    frames = [red, Image.new("RGB", (8, 6), (0, 0, 255))]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    for data, size in [
        (encoded(red, "PNG"), (8, 6)),
        (encoded(red.convert("P"), "PNG"), (8, 6)),
        (encoded(red.convert("RGBA"), "PNG"), (8, 6)),
        (encoded(red, "WEBP", save_all=True, append_images=frames[1:], lossless=True), (8, 6)),
        (encoded(red.convert("CMYK"), "JPEG", quality=100), (8, 6)),
        (encoded(red, "JPEG", quality=100, exif=exif), (6, 8)),
        ({"bytes": encoded(red, "PNG"), "path": None}, (8, 6)),
    ]:
        image = decode_image(data)
        assert image.mode == "RGB" and image.size == size
        assert np.abs(np.array(image, dtype=int) - [255, 0, 0]).max() <= 3
    gone = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(encoded(gone, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_decode_image_reads_a_path(tmp_path):
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "image.png")
    assert decode_image({"bytes": None, "path": str(tmp_path / "image.png")}).getpixel((0, 0)) == (0, 0, 255)


def test_decode_image_refuses_what_is_no_image(monkeypatch):
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    for data in (None, b"", b"no image", whole[: len(whole) // 2], {"bytes": None, "path": "/no/such.png"}, 7):
        with pytest.raises(ValueError, match="not a readable image"):
            decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="DecompressionBomb"):
        decode_image(whole)


def test_a_table_may_come_as_a_glob(tmp_path):
    """Shards in name order; the labels follow."""
    table = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 9)
    for i in range(3):
        pq.write_table(table.slice(3 * i, 3), tmp_path / f"shard-{i}.parquet")
    relabel(dataset_name=tmp_path / "shard-*.parquet", output_path=tmp_path / "out" / "labels.parquet")
    labels = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert labels["ranking_id"].to_pylist() == table["ranking_id"].to_pylist()
    assert pa.types.is_float32(labels.schema.field("soft_label_0").type)
