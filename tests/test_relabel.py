"""relabel_pickapic.py on the tiny pairs and on damaged ones."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, relabel
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from relabel_pickapic import decode_image, parse_args


def test_labels_of_the_tiny_pairs(labels_path):
    pairs, labels = pq.read_table(TINY / "pairs" / "train.parquet"), pq.read_table(labels_path)
    assert labels.column_names == [
        "image_0_uid", "image_1_uid", "ranking_id", "label_0", "score_0", "score_1", "soft_label_0", "valid"
    ]  # fmt: skip
    for key in ("image_0_uid", "image_1_uid", "ranking_id", "label_0"):  # one row a source row, in its order
        assert labels[key].to_pylist() == pairs[key].to_pylist()

    metadata = json.loads(pq.read_schema(labels_path).metadata[b"smpo_labels"])
    scores = np.stack([labels["score_0"].to_numpy(), labels["score_1"].to_numpy()]).astype(np.float64)
    assert metadata["score_min"] == np.nanmin(scores) and metadata["score_max"] == np.nanmax(scores)
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


def test_published_range_and_batch_size_leave_the_scores_alone(labels_path, tmp_path):
    relabel(output_path=tmp_path / "labels.parquet", batch_size=7, score_min=0.1, score_max=0.3)
    ours, theirs = pq.read_table(tmp_path / "labels.parquet"), pq.read_table(labels_path)
    for i in (0, 1):
        a, b = (table[f"score_{i}"].to_numpy().astype(np.float64) for table in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-6)
    gap = (ours["score_0"].to_numpy() - ours["score_1"].to_numpy()).astype(np.float64) / 0.2
    np.testing.assert_allclose(ours["soft_label_0"].to_numpy(), 1 / (1 + np.exp(-gap)), rtol=1e-5)
    metadata = json.loads(ours.schema.metadata[b"smpo_labels"])
    assert metadata["range_from"] == "the command line" and metadata["score_max"] == 0.3


def test_other_column_names_and_a_folder_of_images(labels_path, tmp_path):
    """A data set that knows its columns as `datasets.Image`, has other names and no ranking id, saved to disk."""
    import datasets

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
        ({"dataset_split_name": "validation"}, "--dataset_split_name validation cannot be loaded"),
        ({"image_0_column": "caption", "image_1_column": "caption"}, "0 of the .* images .* were scored"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        relabel(**{"output_path": tmp_path / "labels.parquet", **flags})
    assert not list(tmp_path.iterdir())


def test_labels_are_never_overwritten(tmp_path):
    path = tmp_path / "labels.parquet"
    path.write_text("labels that took a day")
    with pytest.raises(ValueError, match="exists: move it away"):
        parse_args(["--dataset_name", "x", "--output_path", str(path)])


# Images


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
