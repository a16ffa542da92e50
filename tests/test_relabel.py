"""relabel_pickapic.py on the tiny pairs and on damaged ones."""

import hashlib
import io
import json
import os
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, TINY, assert_same_labels, encoded, names_in, relabel, train, with_column, write_pairs
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

import relabel_pickapic
from relabel_pickapic import ParquetShards, PieceImages, UserError, cut_pieces, decode_image, make_labels, parse_args


def metadata_of(path):
    return json.loads(pq.read_schema(path).metadata[b"smpo_labels"])


def scores_of(path):
    """Raw scores `[2, P]` of a labels file, in float64."""
    labels = pq.read_table(path)
    return np.stack([labels[f"score_{side}"].to_numpy().astype(np.float64) for side in (0, 1)])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags of a run on 64 pairs of few images, which are three files, and the labels of one."""
    folder = tmp_path_factory.mktemp("few")
    table = pq.read_table(TINY / "pairs" / "train.parquet").sort_by("caption").slice(0, 64)
    (folder / "pairs").mkdir()
    for i in range(3):
        pq.write_table(table.slice(24 * i, 24), folder / "pairs" / f"{i}.parquet", row_group_size=16)
    flags = {"dataset_name": folder / "pairs" / "*.parquet", "dataloader_num_workers": 0}
    relabel(output_path=folder / "labels.parquet", **flags)
    return SimpleNamespace(table=table, flags=flags, labels=folder / "labels.parquet")


def test_labels_of_the_tiny_pairs(labels_path):
    pairs, labels = pq.read_table(TINY / "pairs" / "train.parquet"), pq.read_table(labels_path)
    assert labels.column_names == [
        "image_0_uid", "image_1_uid", "ranking_id", "label_0", "score_0", "score_1", "soft_label_0", "valid",
        "invalid_reason",
    ]  # fmt: skip
    for key in ("image_0_uid", "image_1_uid", "ranking_id", "label_0"):  # one row a source row, in its order
        assert labels[key].to_pylist() == pairs[key].to_pylist()

    metadata, scores = metadata_of(labels_path), scores_of(labels_path)
    assert metadata["score_min"] == np.nanmin(scores) and metadata["score_max"] == np.nanmax(scores)
    assert metadata["num_rows"] == len(pairs) and metadata["num_invalid"] == 5
    assert metadata["range_from"] == "the scores" and metadata["dataset_split_name"] == "train"
    assert metadata["dataset_name"] == "pairs" and metadata["reward_model"] == "pickscore"
    assert str(TINY) not in json.dumps(metadata)  # no paths of this machine

    normalised = (scores - np.nanmin(scores)) / (np.nanmax(scores) - np.nanmin(scores))
    soft = np.exp(normalised[0]) / np.exp(normalised).sum(axis=0)
    valid = labels["valid"].to_numpy()
    np.testing.assert_allclose(labels["soft_label_0"].to_numpy()[valid], soft[valid], rtol=1e-5)
    # The damaged rows, and no others, have no label; their other image is still scored.
    assert np.array_equal(~valid, np.isnan(scores[0])) and not np.isnan(scores[1]).any()
    assert labels["soft_label_0"].is_null().to_numpy().tolist() == (~valid).tolist()
    # It is fit for few rows.
    file = pq.ParquetFile(labels_path)
    column = file.metadata.row_group(0).column(labels.column_names.index("soft_label_0"))
    assert column.has_offset_index and column.has_column_index and column.compression == "ZSTD"
    assert pa.types.is_float32(labels.schema.field("soft_label_0").type)
    assert not labels_path.with_suffix(".scores").exists()


@torch.no_grad()
def cosines_of(text, images):
    """Scores by transformers' own forward pass, give or take its rounding."""
    model = CLIPModel.from_pretrained(TINY / "pickscore").float()
    processor = CLIPProcessor.from_pretrained(TINY / "pickscore")
    inputs = processor(text=[text], images=images, return_tensors="pt", truncation=True, max_length=77)
    cosines = model(**inputs).logits_per_image[:, 0] / model.logit_scale.exp()
    return pytest.approx(cosines.tolist(), abs=2e-6)


def test_scores_are_the_models_cosines(labels_path):
    pairs, labels = pq.read_table(TINY / "pairs" / "train.parquet").to_pylist(), rows_of(labels_path)
    for pair, row in [both for both in zip(pairs, labels) if both[1]["valid"]][:8]:
        images = [Image.open(io.BytesIO(pair[f"jpg_{i}"])) for i in (0, 1)]
        assert [row["score_0"], row["score_1"]] == cosines_of(pair["caption"], images)


def test_workers_read_and_preprocess_as_the_processor_does(tmp_path):
    """Each row group of a file, or a part of a large one, by itself; images of two pieces never together."""
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    rng = np.random.default_rng(0)
    sizes = [(512, 512), (640, 448), (768, 1024), (100, 300), (224, 224)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    columns = {"jpg_0": [encoded(image) for image in images], "jpg_1": [encoded(i, "BMP") for i in images]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet", row_group_size=3)

    class Shards(ParquetShards):
        def read(self, *args):
            (tmp_path / f"{os.getpid()}.reader").touch()
            return super().read(*args)

    args = parse_args(["--dataset_name", str(tmp_path), "--output_path", "labels.parquet", "--dtype", "float32"])
    shards, scored = Shards([str(tmp_path / "pairs.parquet")]), np.arange(10) % 2 == 0
    dataset = PieceImages(shards, cut_pieces(shards.row_groups), scored, 2, processor, args)
    items = list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2))
    assert f"{os.getpid()}.reader" not in names_in(tmp_path) and len(list(tmp_path.glob("*.reader"))) == 2
    seen = sorted((item["piece"].start, [*item["found"].index]) for item in items)
    assert seen == [(0, [0, 1, 2, 3]), (0, [4, 5]), (3, [6, 7, 8, 9])]
    for item in items:
        for place, pixels in zip(item["found"].index[::2], item["pixels"], strict=True):
            assert torch.equal(pixels, processor(images=images[place // 2], return_tensors="pt")["pixel_values"][0])
    assert len(set(pd.concat([item["found"] for item in items])["hash"])) == 10  # bytes, not pixels


def test_pieces_cover_each_row_once():
    most, num_parts = relabel_pickapic.PIECE_ROWS, relabel_pickapic.MAX_PARTS
    row_groups = [[3, most, 0, 10 * num_parts * most + 5], [], [1, most + 1]]
    pieces = cut_pieces(row_groups)
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert pieces[0].start == 0 and pieces[-1].stop == sum(map(sum, row_groups))
    for piece in pieces:
        assert piece.first_row + piece.stop - piece.start <= row_groups[piece.shard][piece.group]
    assert len([piece for piece in pieces if (piece.shard, piece.group) == (0, 3)]) == num_parts


@pytest.fixture
def embedded(monkeypatch):
    """Counts what is embedded by wrapping the functions that do it: images and texts of each batch."""
    counts = {"embed_images": [], "embed_texts": []}
    for name, batches in counts.items():

        def count(*args, function=getattr(relabel_pickapic, name), batches=batches):
            batches.append(args[-1])
            return function(*args)

        monkeypatch.setattr(relabel_pickapic, name, count)
    return counts


def test_each_image_is_scored_once(few, embedded, tmp_path):
    """And each caption once a batch, of whatever size."""
    relabel(output_path=tmp_path / "labels.parquet", batch_size=24, **few.flags)
    images = {(row[f"image_{side}_uid"], row["caption"]) for row in few.table.to_pylist() for side in (0, 1)}
    assert sum(map(len, embedded["embed_images"])) == len(images) < 1.2 * len(few.table)
    assert all(len(texts) == len(set(texts)) for texts in embedded["embed_texts"])
    assert_same_labels(tmp_path / "labels.parquet", few.labels, atol=1e-6)


def test_batches_shrink_until_they_fit(few, embedded, tmp_path, monkeypatch):
    """With real failures to allocate memory; and another error is not taken for one."""
    embed_images, most = relabel_pickapic.embed_images, 10

    def allocate(model, pixels):
        torch.empty(2**50 if len(pixels) > most else 1, dtype=torch.uint8)
        return embed_images(model, pixels)

    monkeypatch.setattr(relabel_pickapic, "embed_images", allocate)
    relabel(output_path=tmp_path / "labels.parquet", batch_size=8, **few.flags)
    assert 5 < max(map(len, embedded["embed_images"])) <= 10
    assert_same_labels(tmp_path / "labels.parquet", few.labels, atol=1e-6)
    most = 0
    with pytest.raises(UserError, match="--reward_model .* has too little memory on cpu for one pair: free some"):
        relabel(output_path=tmp_path / "none.parquet", **few.flags)
    small = torch.OutOfMemoryError("of the card")
    monkeypatch.setattr(relabel_pickapic, "load_reward", lambda *args: (_ for _ in ()).throw(small))
    with pytest.raises(UserError, match="--reward_model .* has too little memory on cpu for one pair: free some"):
        relabel(output_path=tmp_path / "none.parquet", **few.flags)
    monkeypatch.undo()
    monkeypatch.setattr(relabel_pickapic, "embed_images", lambda *args: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        relabel(output_path=tmp_path / "labels-2.parquet", **few.flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"score_range": [0.3, 0.1]}, "--score_range must be a MIN and a larger MAX, got 0.3 0.1"),
        ({"output_path": "labels.csv"}, "must end in .parquet"),
        (
            {"caption_column": "prompt"},
            "(?s)--caption_column prompt: there is no such column.*train.parquet has .*caption",
        ),
        ({"key_columns": ["uid"]}, "--key_columns takes two or three columns, got uid"),
        ({"dataset_name": "no/such/set"}, "(?s)--dataset_name no/such/set .* cannot be loaded.*Accepted: a Hub name"),
        ({"hub_public": True}, "--hub_dataset_id and --hub_public do nothing without --push_to_hub"),
        (
            {"dataset_name": None, "pairs_from": "x", "push_to_hub": True},
            "--push_to_hub, --reward_model can do nothing",
        ),
        ({"output_path": TINY / "pairs" / "labels.parquet"}, "labels.parquet would lie among the data of --dat"),
        ({"output_path": TINY / "x.parquet", "dataset_name": TINY / "*.parquet"}, "would lie among the data of"),
        ({"reward_model": "~/no/lr=1e-5/model"}, "--reward_model /.*/no/lr=1e-5/model cannot be loaded"),
        ({"reward_model": "mine=no/model"}, "--reward_model no/model cannot be loaded"),
        ({"reward_model": TINY / "sd15" / "text_encoder"}, "is a .*, not a CLIP-style model"),
        ({"dataset_split_name": "absent"}, "--dataset_split_name absent cannot be loaded: it has the splits train, t"),
        ({"dataset_name": ROOT / "pyproject.toml"}, "(?s)is a file, and none named .parquet.*Accepted: a Hub"),
        ({"image_columns": ["jpg_0", "caption"]}, "--image_columns caption holds string, not encoded images"),
        ({"human_label_column": "caption"}, "--human_label_column caption holds string, not numbers"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        relabel(**{"output_path": tmp_path / "labels.parquet", **flags})
    assert not list(tmp_path.glob("*.p*"))


@pytest.mark.parametrize("rows, columns, message", [
    (0, {}, "has no rows in the split train"),
    (8, {"caption": pa.nulls(8, pa.string())}, "pairs.parquet holds no captions"),
    (8, {"jpg_1": pa.nulls(8, pa.binary())}, "8 of 16 images .*the two of a pair are needed. Check --image_columns"),
    (8, dict.fromkeys(["jpg_0", "jpg_1"], pa.nulls(8, pa.binary())), "0 of 16 images .*Check --image_col.*not a read"),
])  # fmt: skip
def test_data_without_rows_captions_or_images(rows, columns, message, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet", rows, **columns)
    with pytest.raises(UserError, match=message):
        relabel(dataset_name=pairs, output_path=tmp_path / "labels.parquet")


def test_what_is_there_is_never_overwritten(few, tmp_path):
    """And is refused before anything is scored."""
    path = tmp_path / "labels.parquet"
    path.write_text("what took a day")
    (tmp_path / "labels.scores").mkdir()
    (tmp_path / "labels.scores" / "notes.txt").write_text("what took a day")
    with pytest.raises(UserError, match="labels.parquet exists. Move it away"):
        relabel(**{**few.flags, "reward_model": "/no/model", "output_path": path})
    path.unlink()
    relabel(output_path=path, **few.flags)
    assert names_in(tmp_path / "labels.scores") == {"notes.txt"}


def test_the_range_can_be_given(few, tmp_path):
    relabel(output_path=tmp_path / "labels.parquet", score_range=[0.1, 0.3], **few.flags)
    scores, metadata = scores_of(tmp_path / "labels.parquet"), metadata_of(tmp_path / "labels.parquet")
    expected = 1 / (1 + np.exp(-(scores[0] - scores[1]) / 0.2))
    soft_label_0 = pq.read_table(tmp_path / "labels.parquet")["soft_label_0"]
    np.testing.assert_allclose(soft_label_0.to_numpy(), expected, rtol=1e-5)
    assert metadata["range_from"] == "the command line" and metadata["score_max"] == 0.3


@pytest.mark.parametrize("name, revision, public", [
    ("ada/pairs", "a" * 40, "ada/pairs"),
    ("/home/ada/private/pairs", None, "pairs"),
    ("https://ada:password@files.org/private/pairs.parquet?key=1", None, "pairs.parquet"),
])  # fmt: skip
def test_names_that_others_may_read_and_a_score_that_is_not_finite(name, revision, public):
    found = pd.DataFrame({"hash": 0, "problem": None, "score": np.float32([0.1, 0.2, 0.3, np.nan])})
    rows = pa.table({"image_0_uid": ["a", "b"], "image_1_uid": ["c", "d"], "caption": ["e", "f"]})
    source = {"reward_model": name, "revision": revision, "reward_processor": name, "processor_revision": revision}
    args = parse_args(["--dataset_name", name, "--output_path", "labels.parquet"])
    labels, metadata = make_labels(found, rows, {**source, "label_range": None}, revision, args)
    assert {metadata[key] for key in ("dataset_name", "reward_model", "reward_processor")} == {public}
    assert metadata["invalid"]["not finite"] == 1
    assert labels["invalid_reason"].to_pylist() == [None, "image 1: the score is not finite"]
    assert labels["score_1"].is_null().to_pylist() == labels["soft_label_0"].is_null().to_pylist() == [False, True]


def test_two_folders_become_pairs_that_are_labelled_and_trained_on(tmp_path):
    folder, pairs, labels = tmp_path / "mine", tmp_path / "pairs.parquet", tmp_path / "labels.parquet"
    table = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 4).to_pylist()
    for i, side in enumerate(("preferred", "rejected")):
        (folder / side).mkdir(parents=True)
        for number, row in enumerate(table):
            (folder / side / f"{number}.jpg").write_bytes(row[f"jpg_{i}"])
    flags = {"dataset_name": None, "reward_model": None, "pairs_from": folder, "output_path": pairs}
    (folder / "rejected" / "5.png").touch()
    (folder / "preferred" / "0.txt").write_text(" \n")
    (folder / "preferred" / "sub").mkdir()  # no image
    message = r"in one folder only: \['5.png'\]; no caption: \['0.jpg', .*Accepted: a folder"
    with pytest.raises(UserError, match=message):
        relabel(**flags)
    (folder / "rejected" / "5.png").unlink()
    for number, row in enumerate(table[:2]):
        (folder / "preferred" / f"{number}.txt").write_text(row["caption"] + "\n")
    (folder / "metadata.csv").write_text("file_name,caption\n2.jpg,a circle, red\n3.jpg,a square\n")
    with pytest.raises(UserError, match="--pairs_from .* a line of metadata.csv has more cells than the first: quote"):
        relabel(**flags)
    others = [{"file_name": f"{number}.jpg", "caption": table[number]["caption"]} for number in (2, 3)]
    pd.DataFrame(others).to_csv(folder / "metadata.csv", index=False)
    relabel(**flags)
    for found, row in zip(pq.read_table(pairs).to_pylist(), table, strict=True):
        assert found["label_0"] == 1 and all(found[name] == row[name] for name in ("jpg_0", "jpg_1", "caption"))
        assert found["image_0_uid"] == hashlib.sha256(row["jpg_0"]).hexdigest() != found["image_1_uid"]
    with pytest.raises(UserError, match="pairs.parquet exists"):
        relabel(**flags)
    relabel(dataset_name=pairs, output_path=labels)
    train(tmp_path / "tuned", dataset_name=pairs, labels_path=labels, max_train_steps=1)


# Rows that are not as they should be


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_images_and_captions_that_are_damaged_or_missing(tmp_path):
    """What cannot be seen has no label, a reason and a count; the other image, and a long caption, are scored."""
    image = decode_image(pq.read_table(TINY / "pairs" / "test.parquet")["jpg_0"][0].as_py())
    exif = Image.Exif()
    exif[0x0112] = 6
    whole, long = encoded(image), "word " * 200
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    Image.open(io.BytesIO(script))  # Pillow alone would have Ghostscript run it
    bad = {"cut": whole[:-99], "empty": b"", "null": None, "text": b"an essay", "script": script}
    bad |= {"huge": encoded(Image.new("1", (8000, 8000))), "long": encoded(Image.new("1", (4000, 1)), "PNG")}
    images = {"whole": whole, "turned": encoded(image.rotate(90, expand=True), "PNG", exif=exif), **bad}
    rows = [(data, whole, "a large red circle", name, "same") for name, data in images.items()]
    rows += [(whole, whole, caption, f"caption {caption}", "same") for caption in (None, "", long)]
    names = ["jpg_0", "jpg_1", "caption", "image_0_uid", "image_1_uid"]
    pq.write_table(pa.Table.from_pylist([dict(zip(names, row)) for row in rows]), tmp_path / "pairs.parquet")
    relabel(dataset_name=tmp_path / "pairs.parquet", output_path=tmp_path / "labels.parquet", dataloader_num_workers=2)

    rows = {row["image_0_uid"]: row for row in rows_of(tmp_path / "labels.parquet")}
    assert rows["turned"]["score_0"] == pytest.approx(rows["whole"]["score_0"], abs=1e-6)  # the same picture
    for row in (rows[name] for name in bad):
        assert row["score_0"] is None and row["soft_label_0"] is None and not row["valid"]
        assert row["score_1"] is not None and row["invalid_reason"].startswith("image 0: not a readable image (")
    assert "8000 x 8000 pixels, more than 50,000,000" in rows["huge"]["invalid_reason"]
    assert "4000 x 1 pixels, more than 50,000,000 or of more than 100 to 1" in rows["long"]["invalid_reason"]
    assert "UnidentifiedImageError" in rows["script"]["invalid_reason"]
    assert rows["caption None"]["invalid_reason"] == "no caption" and rows["caption None"]["score_1"] is None
    assert rows["caption "]["valid"] and rows["whole"]["valid"] and rows["whole"]["invalid_reason"] is None
    metadata = metadata_of(tmp_path / "labels.parquet")
    assert metadata["invalid"] == {"no caption": 1, "not a readable image": 7, "not finite": 0}
    assert metadata["num_valid"] == len(rows) - 8
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(7)
    assert [rows[f"caption {long}"]["score_0"]] == cosines_of(long, [image])


def test_one_uid_with_other_bytes_is_another_image(tmp_path):
    """Damaged bytes where a uid first occurs do not spoil good ones after them, nor do two images share a score."""
    pairs = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 12).to_pylist()
    pairs[1]["jpg_0"] = pairs[1]["jpg_0"][:300]
    pairs[9]["jpg_0"] = pairs[5]["jpg_0"]
    rows = {}
    for name, uid_0, uid_1 in (("shared", "uid {}", None), ("distinct", "left {1}", "right {1}")):
        for i, row in enumerate(pairs):
            row["image_0_uid"], row["image_1_uid"] = uid_0.format(i % 4, i), uid_1 and uid_1.format(i % 4, i)
            row["caption"] = pairs[0]["caption"]
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(pairs), path)
        relabel(dataset_name=path, output_path=tmp_path / name / "labels.parquet", dataloader_num_workers=0)
        rows[name] = rows_of(tmp_path / name / "labels.parquet")
    for one, other in zip(rows["shared"], rows["distinct"]):
        assert one["valid"] == other["valid"] and one["invalid_reason"] == other["invalid_reason"]
        scores = ([row[f"score_{i}"] or 0 for i in (0, 1)] for row in (one, other))
        assert next(scores) == pytest.approx(next(scores), abs=1e-6)
    assert [row["valid"] for row in rows["shared"]] == [i != 1 for i in range(12)]
    assert rows["shared"][5]["score_0"] == rows["shared"][9]["score_0"]


@pytest.mark.parametrize("column, message", [
    ("ranking_id", "of several files cannot be loaded: .*ranking_id has incompatible types: int64 vs string"),
    ("jpg_1", "--image_columns jpg_1 holds string, not encoded images.\nName .*/b.parquet has are_different"),
])  # fmt: skip
def test_files_of_other_types_are_named(column, message, tmp_path):
    table = pq.read_table(TINY / "pairs" / "train.parquet").slice(0, 2)
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(with_column(table, "label_0", pa.nulls(2)), tmp_path / "a-unlabelled.parquet")  # nothing is wrong
    pq.write_table(with_column(table, column, pa.array(["x", "y"])), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=message):
        relabel(dataset_name=tmp_path / "*.parquet", output_path=tmp_path / "out" / "labels.parquet")


def test_a_key_that_not_every_file_has_is_none(tmp_path):
    table = pq.read_table(TINY / "pairs" / "train.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "a.parquet")
    pq.write_table(table.slice(2, 2).drop_columns("ranking_id"), tmp_path / "b.parquet")
    relabel(dataset_name=tmp_path / "*.parquet", output_path=tmp_path / "out" / "labels.parquet")
    labels = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert len(labels) == 4 and "ranking_id" not in labels.column_names


# What is written


def test_columns_of_other_names_and_images_that_are_only_named(labels_path, tmp_path):
    """Columns of `datasets.Image`; a row that has an image's path and not its bytes is told how to embed it."""
    rows = pq.read_table(TINY / "pairs" / "train.parquet").slice(0, 5).to_pylist()
    pairs = {"a": "image_0_uid", "b": "image_1_uid", "prompt": "caption", "left": "jpg_0", "right": "jpg_1"}
    pairs = {name: [row[column] for row in rows] for name, column in pairs.items()}
    images = {name: [{"bytes": image, "path": None} for image in pairs[name]] for name in ("left", "right")}
    (tmp_path / "5-right.jpg").write_bytes(pairs["right"][4])
    images["right"][4] = {"bytes": None, "path": str(tmp_path / "5-right.jpg")}
    features = {name: datasets.Image() if name in images else datasets.Value("string") for name in pairs}
    table = pa.table({**pairs, **images}).cast(datasets.Features(features).arrow_schema)
    pq.write_table(table, tmp_path / "pairs.parquet")
    relabel(
        dataset_name=tmp_path / "pairs.parquet", output_path=tmp_path / "labels.parquet", caption_column="prompt",
        image_columns=["left", "right"], key_columns=["a", "b"],
    )  # fmt: skip
    labels, expected = pq.read_table(tmp_path / "labels.parquet"), pq.read_table(labels_path).slice(0, 5)
    assert labels.column_names[:2] == ["image_0_uid", "image_1_uid"] and "ranking_id" not in labels.column_names
    assert labels["image_1_uid"].equals(expected["image_1_uid"])
    assert "only a path, 5-right.jpg: `Dataset.push_to_hub` embeds" in labels["invalid_reason"][4].as_py()
    for column in ("score_0", "score_1"):
        scores, same = (table[column].to_pylist()[:4] for table in (labels, expected))
        assert scores == pytest.approx(same, abs=1e-6)
    assert labels["score_1"][4].as_py() is None


# Images


def test_decode_image_in_every_mode():
    red = Image.new("RGB", (8, 6), (255, 0, 0))
    frames = [red, Image.new("RGB", (8, 6), (0, 0, 255))]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    for data, size in [
        (encoded(red), (8, 6)),
        (encoded(red.convert("P")), (8, 6)),
        (encoded(red.convert("RGBA")), (8, 6)),
        (encoded(red, "WEBP", save_all=True, append_images=frames[1:], lossless=True), (8, 6)),
        (encoded(red.convert("CMYK"), "JPEG", quality=100), (8, 6)),
        (encoded(red, "JPEG", quality=100, exif=exif), (6, 8)),
        ({"bytes": encoded(red), "path": None}, (8, 6)),
    ]:
        image = decode_image(data)
        assert image.mode == "RGB" and image.size == size
        assert np.abs(np.array(image, dtype=int) - [255, 0, 0]).max() <= 3
    grey = encoded(Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)))
    assert decode_image(grey).getpixel((0, 0)) == (155, 155, 155)  # 40,000 / 257
    gone = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(encoded(gone)).getpixel((0, 0)) == (255, 255, 255)


def test_agreement_counts_what_label_and_people_decided(caplog):
    rows = [(0.6, 1.0), (0.7, 0.0), (0.5, 1.0), (0.5, 0.0), (0.4, 0.5), (0.4, None)]
    table = pa.table({"soft_label_0": [soft for soft, _ in rows], "label_0": [label for _, label in rows]})
    PartialState(cpu=True)  # the logger asks it which process this is
    with caplog.at_level("INFO"):
        relabel_pickapic.report(table.append_column("valid", pa.array([True] * len(rows))), {})
    assert "The label agrees with people on 1 of the 2 pairs that both decided." in caplog.text
