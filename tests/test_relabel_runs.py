"""No score is lost: killed, broken and divided runs of relabel_pickapic.py, and data that lie on a Hub."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import datasets
import hub_server
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, assert_same_labels, command_line, names_in, relabel, run_script, split_pairs
from fork_server import ForkServer, wait_for
from test_standalone import LAUNCH

from relabel_pickapic import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """30 files of 20 pairs; a few images lead to a second look, as other bytes have their uid and caption."""
    folder = split_pairs(tmp_path_factory.mktemp("shards") / "pairs", 20)
    path = folder / "train-00029.parquet"
    table = pq.read_table(path)
    first = pq.read_table(folder / "train-00000.parquet").slice(0, 3)
    stolen = pa.concat_tables([first, table.slice(3)]).set_column(
        table.column_names.index("jpg_1"), "jpg_1", table["jpg_1"]
    )
    pq.write_table(stolen, path, row_group_size=16)
    return folder / "*.parquet"


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """Labels of an uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "labels.parquet"
    relabel(dataset_name=shards, output_path=path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where downloaded models are kept: ada/clip, whose newest commit prepares images in another way than "old"."""
    folder = tmp_path_factory.mktemp("cache") / "models--ada--clip"
    (folder / "refs").mkdir(parents=True)
    for revision, commit, mean in (("old", "a" * 40, None), ("main", "b" * 40, [0.9, 0.1, 0.5])):
        (folder / "refs" / revision).write_text(commit)
        shutil.copytree(TINY / "pickscore", folder / "snapshots" / commit)
        settings = json.loads((TINY / "pickscore" / "preprocessor_config.json").read_text())
        settings["image_mean"] = mean or settings["image_mean"]
        (folder / "snapshots" / commit / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder.parent


@pytest.fixture(scope="module")
def server(cache, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with ForkServer("relabel_pickapic", log, HF_HUB_CACHE=str(cache)) as server:
        yield server


def flags_of(path, **flags):
    return command_line(**{"reward_model": TINY / "pickscore", "output_path": path, **flags})


def pieces_in(folder):
    """`{piece: its file and time}`; a piece that was scored again would be another file."""
    found = [*folder.glob("piece-*"), *folder.glob("again-*")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_the_revision_is_also_the_processors(server, labels_path, tmp_path):
    path = tmp_path / "labels.parquet"
    args = flags_of(path, dataset_name=TINY / "pairs", reward_model="ada/clip", reward_model_revision="old")
    assert server.run(args) == 0
    assert_same_labels(path, labels_path)
    (reward,) = json.loads(pq.read_schema(path).metadata[b"smpo_labels"])["rewards"]
    assert reward["reward_model"] == "ada/clip"
    assert reward["revision"] == reward["processor_revision"] == "a" * 40


def test_killed_again_and_again(server, shards, whole, num_kills, tmp_path):
    """SIGKILL at random moments, from the start to the labels: the same file, and no piece scored twice."""
    rng, killed, finished, path = random.Random(0), 0, 0, tmp_path / "labels.parquet"
    folder, args = path.with_suffix(".scores"), flags_of(path, dataset_name=shards)
    while killed < num_kills or not finished:
        before = pieces_in(folder)
        process = server.start(args)
        wait_for(lambda: pieces_in(folder).keys() - before.keys() or len(before) > 60 or path.exists())
        time.sleep(rng.uniform(0, 0.2))
        after = pieces_in(folder)
        assert not folder.exists() or path.exists() or before.items() <= after.items()
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process, signal.SIGKILL)
        killed += server.wait() == -signal.SIGKILL
        if path.exists():
            assert path.read_bytes() == whole.read_bytes()
            finished += 1
            for rest in (folder, path.with_suffix(".png"), path):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
    assert killed >= num_kills


@pytest.mark.parametrize("limit", [400, 3_000, 30_000])
def test_a_disk_without_room(limit, shards, whole, tmp_path):
    """Of what is written first not all fits. What was finished is kept, and used."""
    path = tmp_path / "labels.parquet"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(
            UserError, match=f"{tmp_path}/.* cannot be written: .*What was finished .* is kept: make room"
        ):
            # Without worker processes: the limit would be one of the memory that they share, too.
            relabel(dataset_name=shards, output_path=path, dataloader_num_workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(path.with_suffix(".scores").glob(".*.tmp"))
    relabel(dataset_name=shards, output_path=path)
    assert path.read_bytes() == whole.read_bytes()


# Files that are not whole


def test_a_file_without_its_end_is_named_before_anything_is_scored(shards, tmp_path):
    shutil.copytree(shards.parent, tmp_path / "pairs")
    for i in (3, 17):
        path = tmp_path / "pairs" / f"train-{i:05d}.parquet"
        path.write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "pairs" / "train-00020.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="(?s)3 of 30 Parquet files .*00003.parquet: .*00017.*00020.*Fetch them again"):
        relabel(dataset_name=tmp_path / "pairs" / "*.parquet", output_path=tmp_path / "labels.parquet")


def test_a_file_damaged_in_the_middle_holds_up_nothing_else(shards, whole, tmp_path):
    shutil.copytree(shards.parent, tmp_path / "pairs")
    broken, path = tmp_path / "pairs" / "train-00007.parquet", tmp_path / "labels.parquet"
    column = pq.ParquetFile(broken).metadata.row_group(1).column(pq.read_schema(broken).names.index("jpg_0"))
    data = bytearray(broken.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 200] = bytes(200)
    broken.write_bytes(data)
    flags = {"dataset_name": tmp_path / "pairs" / "*.parquet", "output_path": path}
    with pytest.raises(
        UserError, match="(?s)not be read to the end, see above:\n[^\n]*train-00007.parquet\nAll else is"
    ):
        relabel(**flags)
    pieces = pieces_in(path.with_suffix(".scores"))
    assert len(pieces) == 58  # two row groups a file but the last
    shutil.copy(shards.parent / broken.name, broken)
    relabel(**flags)
    assert_same_labels(path, whole)


def test_another_run_in_the_folder_is_refused(server, shards, whole, tmp_path):
    path = tmp_path / "labels.parquet"
    process = server.start(flags_of(path, dataset_name=shards))
    wait_for(lambda: pieces_in(path.with_suffix(".scores")))
    os.killpg(process, signal.SIGKILL)
    server.wait()
    for column, value in (("caption", "a small blue cross"), ("jpg_1", b"")):
        shutil.copytree(shards.parent, tmp_path / column)
        edited = tmp_path / column / "train-00002.parquet"
        table = pq.read_table(edited)
        values = pa.array([*table[column].to_pylist()[:-1], value])
        table = table.set_column(table.column_names.index(column), column, values)
        pq.write_table(table, edited, row_group_size=16)
    for flags, change in [
        ({"dataset_name": tmp_path / "caption" / "*.parquet"}, "rows, keys, captions, labels: "),
        ({"dataset_name": tmp_path / "jpg_1" / "*.parquet"}, "rows, keys, captions, labels: "),
        ({"dtype": "bfloat16"}, "dtype: float32 then, bfloat16 now"),
        ({"human_label_column": "label_1"}, "human_label_column: label_0 then, label_1 now"),
        ({"reward_model": f"other={TINY / 'pickscore'}"}, "reward_model: "),
    ]:
        with pytest.raises(UserError, match=f"(?s)labels.scores holds the scores of another run, of .*:.*{change}"):
            relabel(**{"dataset_name": shards, "output_path": path, **flags})
    relabel(dataset_name=shards, output_path=path, batch_size=64, score_min=-1, score_max=1)  # these may change
    assert_same_labels_but_for_the_range(path, whole)


def assert_same_labels_but_for_the_range(path, whole):
    for i in (0, 1):
        ours, theirs = (pq.read_table(p)[f"score_{i}"].to_numpy() for p in (path, whole))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


# Several processes


def several_processes(monkeypatch):
    """On the CPU, each with as many threads as this one, as their number changes the last bit of a score."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.mark.parametrize("num_processes, data", [(2, "shards"), (3, "save_to_disk")])
def test_several_processes_write_the_same_file(num_processes, data, shards, whole, tmp_path, monkeypatch):
    name = shards
    if data == "save_to_disk":  # which is two pieces: one of the processes has nothing to do
        name = tmp_path / "saved"
        datasets.Dataset(pa.concat_tables([pq.read_table(p) for p in sorted(shards.parent.glob("*"))])).save_to_disk(
            name
        )
    several_processes(monkeypatch)
    flags = flags_of(tmp_path / "labels.parquet", dataset_name=name, with_images=tmp_path / "copy")
    launcher = (*LAUNCH[:-1], str(num_processes))
    run_script(ROOT / "relabel_pickapic.py", *flags, cwd=tmp_path, launcher=launcher)
    if data == "shards":
        assert (tmp_path / "labels.parquet").read_bytes() == whole.read_bytes()
        assert len(names_in(tmp_path / "copy")) == 30
    else:
        assert_same_labels(tmp_path / "labels.parquet", whole, atol=1e-6)
        assert len(names_in(tmp_path / "copy")) == 1


def test_a_run_goes_on_with_another_number_of_processes(server, shards, whole, tmp_path, monkeypatch):
    path = tmp_path / "labels.parquet"
    args = flags_of(path, dataset_name=shards)
    process = server.start(args)
    wait_for(lambda: len(pieces_in(path.with_suffix(".scores"))) > 4)
    os.killpg(process, signal.SIGKILL)
    server.wait()
    several_processes(monkeypatch)
    run_script(ROOT / "relabel_pickapic.py", *args, cwd=tmp_path, launcher=LAUNCH)
    assert path.read_bytes() == whole.read_bytes()


# A data set on the Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the repository ada/pairs, of three files; where downloads go; runs that see it, and their log."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "root" / "ada" / "pairs").mkdir(parents=True)
    split_pairs(folder / "root" / "ada" / "pairs" / "data", 200)
    log = folder / "log.txt"
    with hub_server.serve(folder / "root") as hub:
        with ForkServer("relabel_pickapic", log, **hub.environment(folder / "home")) as server:
            yield SimpleNamespace(
                root=folder / "root", home=folder / "home", server=server, log=log, read_only=hub.read_only,
                private=hub.private,
            )  # fmt: skip


@pytest.mark.parametrize("streaming", [True, None])
def test_a_data_set_on_the_hub(streaming, hub, labels_path, tmp_path):
    def copies():
        return {path for path in hub.home.rglob("*") if path.is_file() and path.stat().st_size > 100_000}

    before = copies()
    flags = {"dataset_name": "ada/pairs", "streaming": streaming}
    assert hub.server.run(flags_of(tmp_path / "labels.parquet", **flags)) == 0, hub.log.read_text()
    assert_same_labels(tmp_path / "labels.parquet", labels_path, atol=1e-6)
    assert bool(copies() - before) == (streaming is None)
    metadata = json.loads(pq.read_schema(tmp_path / "labels.parquet").metadata[b"smpo_labels"])
    assert metadata["dataset_name"] == "ada/pairs" and re.fullmatch("[0-9a-f]{40}", metadata["dataset_revision"])


@pytest.mark.parametrize("public", [None, True])
def test_labels_are_uploaded(public, hub, tmp_path):
    """With a card from which `load_dataset` knows what to read; again, without any model, if the Hub failed."""
    repo, path = hub.root / "ada" / f"labelled-{public}", tmp_path / "labels.parquet"
    shutil.copytree(TINY / "pickscore", tmp_path / "model")
    args = flags_of(
        path, dataset_name=TINY / "pairs", dataset_split_name="test", push_to_hub=True, with_images=tmp_path / "copy",
        hub_dataset_id=f"ada/{repo.name}", hub_public=public, reward_model=tmp_path / "model",
    )  # fmt: skip
    hub.read_only.set()
    assert hub.server.run(args) != 0
    assert re.search(
        r"(?s)--push_to_hub: .*labels.parquet is written, and cannot be up.*\nStart the", hub.log.read_text()
    )
    labels = path.read_bytes()
    hub.read_only.clear()
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "copy" / "notes.txt").write_text("not for others")
    assert hub.server.run(args) == 0, hub.log.read_text()
    assert names_in(repo) - {".gitattributes"} == {"README.md", "labels.parquet", "labels.png", "data"}
    assert names_in(repo / "data") == {"test-00000-of-00001.parquet"} and not path.with_suffix(".scores").exists()
    assert (repo / "labels.parquet").read_bytes() == path.read_bytes() == labels
    assert hub.private[f"ada/{repo.name}"] == (not public)
    data = datasets.load_dataset(str(repo), cache_dir=tmp_path / "cache")
    assert (
        list(data) == ["test"] and data["test"]["soft_label_0"][:] == pq.read_table(path)["soft_label_0"].to_pylist()
    )
    card = (repo / "README.md").read_text()
    assert json.dumps({"name": "model"})[1:-1] in card and "![distribution](labels.png)" in card
    assert not [file for file in repo.rglob("*.*") if file.is_file() and str(tmp_path).encode() in file.read_bytes()]
    assert hub.server.run(args) != 0  # now it is finished


def test_labels_from_scores_are_uploaded_again(hub, labels_path, tmp_path):
    args = command_line(
        scores_from=labels_path, output_path=tmp_path / "new.parquet", push_to_hub=True, hub_dataset_id="ada/new"
    )
    hub.read_only.set()
    assert hub.server.run(args) != 0
    hub.read_only.clear()
    assert hub.server.run(args) == 0, hub.log.read_text()
    (tmp_path / "new.parquet").write_bytes(b"what took a day")
    assert hub.server.run(args) != 0 and (tmp_path / "new.parquet").read_bytes() == b"what took a day"


def test_what_the_hub_does_not_have(hub, tmp_path):
    for name, message in [
        ("ada/none", "--dataset_name ada/none .*cannot be loaded"),
        ("ada/pairs", "--image_columns left: there is no such column"),
    ]:
        flags = {"dataset_name": name, "image_columns": ["left", "jpg_1"]}
        assert hub.server.run(flags_of(tmp_path / "labels.parquet", **flags)) != 0
        assert re.search(message, hub.log.read_text())


def test_streaming_is_for_parquet(tmp_path):
    datasets.Dataset(pq.read_table(TINY / "pairs" / "test.parquet")).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        UserError, match="--dataset_name .*saved .*--streaming reads Parquet files in place, and it has"
    ):
        relabel(dataset_name=tmp_path / "saved", streaming=True, output_path=tmp_path / "labels.parquet")
