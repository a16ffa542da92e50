"""No score is lost: killed, broken and divided runs of relabel_pickapic.py, and data that lie on a Hub."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import redirect_stderr, suppress

import datasets
import hub_server
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, assert_same_labels, command_line, damage, names_in, relabel, split_pairs, with_column
from fork_server import ForkServer, wait_for
from huggingface_hub.errors import HTTPError
from test_relabel import metadata_of

import relabel_pickapic
from relabel_pickapic import UserError, open_data, parse_args, start_run


NUM_FILES = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Files of 20 pairs in two row groups; a few uids come again, with their caption and with other bytes."""
    folder = split_pairs(tmp_path_factory.mktemp("shards") / "pairs", 20)
    for path in sorted(folder.iterdir())[NUM_FILES:]:
        path.unlink()
    path = folder / f"train-{NUM_FILES - 1:05d}.parquet"
    table = pq.read_table(path)
    first = pq.read_table(folder / "train-00000.parquet").slice(0, 3)
    stolen = with_column(pa.concat_tables([first, table.slice(3)]), "jpg_1", table["jpg_1"])
    pq.write_table(stolen, path, row_group_size=16)
    return folder / "*.parquet"


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """Labels of an uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "labels.parquet"
    relabel(dataset_name=shards, output_path=path)
    return path


@pytest.fixture(scope="module")
def hub(shards, tmp_path_factory):
    """A Hub with the repository ada/pairs; where downloads go, and runs that see it."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(shards.parent, folder / "root" / "ada" / "pairs" / "data")
    with hub_server.serve(folder / "root") as hub:
        with ForkServer("relabel_pickapic", folder / "log.txt", **hub.environment(folder / "home")) as hub.server:
            hub.home = folder / "home"
            yield hub


@pytest.fixture(scope="module")
def server(hub):
    return hub.server


def flags_of(path, **flags):
    return command_line(**{"reward_model": TINY / "pickscore", "output_path": path, **flags})


def pieces_of(path):
    """`{piece: its file and time}` of labels; a piece that was scored again would be another file."""
    folder = path.with_suffix(".scores")
    found = [*folder.glob("*/piece-*"), *folder.glob("*/again-*")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def stop(server, process):
    with suppress(ProcessLookupError):  # it has ended
        os.killpg(process, signal.SIGKILL)
    return server.wait()


def test_killed_again_and_again(server, shards, whole, num_kills, tmp_path):
    """SIGKILL at random moments, from the start to the labels: the same file, and no piece scored twice."""
    rng, killed, path = random.Random(0), 0, tmp_path / "labels.parquet"
    folder, args = path.with_suffix(".scores"), flags_of(path, dataset_name=shards)
    while killed < num_kills:
        before = pieces_of(path)
        process = server.start(args)
        wait_for(lambda: pieces_of(path).keys() - before.keys() or len(before) > 2 * NUM_FILES or path.exists())
        time.sleep(rng.uniform(0, 0.2))
        after = pieces_of(path)
        assert not folder.exists() or path.exists() or before.items() <= after.items()
        killed += stop(server, process) == -signal.SIGKILL
        if path.exists():
            assert path.read_bytes() == whole.read_bytes()
            path.unlink()
            shutil.rmtree(folder, ignore_errors=True)
    assert server.run(args) == 0 and path.read_bytes() == whole.read_bytes()
    assert names_in(tmp_path) == {path.name}


def test_a_disk_without_room(shards, whole, tmp_path):
    """Of what is written first not all fits. What was finished is kept, and used."""
    path = tmp_path / "labels.parquet"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = []
    for limit in (100, 2_000, 10_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(UserError, match=f"{tmp_path}/.* cannot be written .*What was .* is kept: make room"):
                # Without worker processes: the limit would be one of the memory that they share, too.
                with redirect_stderr(io.StringIO()):  # else into a file, of pytest
                    relabel(dataset_name=shards, output_path=path, dataloader_num_workers=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(tmp_path.rglob("*.tmp"))
        found.append(pieces_of(path))
    assert not found[0] and found[1].items() <= found[2].items() and len(found[2]) > 2 * NUM_FILES
    relabel(dataset_name=shards, output_path=path)
    assert path.read_bytes() == whole.read_bytes()


# Files that are not whole


def test_a_file_without_its_end_is_named_before_anything_is_scored(shards, tmp_path):
    shutil.copytree(shards.parent, tmp_path / "pairs")
    path = tmp_path / "pairs" / "train-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="(?s)--dataset_name .*00003.parquet cannot be loaded: .*fetch it again"):
        relabel(dataset_name=tmp_path / "pairs" / "*.parquet", output_path=tmp_path / "labels.parquet")


def test_a_file_damaged_in_the_middle_holds_up_nothing_else(shards, whole, tmp_path):
    shutil.copytree(shards.parent, tmp_path / "pairs")
    broken, path = tmp_path / "pairs" / "train-00004.parquet", tmp_path / "labels.parquet"
    damage(broken, row_group=1, column="jpg_0")
    flags = {"dataset_name": tmp_path / "pairs" / "*.parquet", "output_path": path}
    with pytest.raises(UserError, match="(?s)could not be read, see above:\n[^\n]*train-00004.parquet\nAll else is"):
        relabel(**flags)
    assert len(pieces_of(path)) == 2 * NUM_FILES - 1
    shutil.copy(shards.parent / broken.name, broken)
    relabel(**flags)
    assert_same_labels(path, whole)


def test_a_lost_connection_and_a_damaged_column_of_keys_are_named(shards, tmp_path, monkeypatch, caplog):
    """The Hub's errors are those of its HTTP library, and none of the system's. No password is told."""

    def read(*args):
        raise HTTPError("lost https://me:secret@host")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not be read.*\n.*train-00000.parquet"):
        patch.setattr(relabel_pickapic.ParquetShards, "read", read)
        relabel(dataset_name=shards, output_path=tmp_path / "labels.parquet")
    assert "lost https://host" in caplog.text and "secret" not in caplog.text
    path = shutil.copy(sorted(shards.parent.iterdir())[0], tmp_path / "damaged.parquet")
    damage(path, row_group=0, column="caption")
    with pytest.raises(UserError, match="(?s)--dataset_name .*damaged.parquet cannot be loaded: .*fetch it again"):
        relabel(dataset_name=path, output_path=tmp_path / "others.parquet")


def test_a_run_is_known_by_all_that_scores_depend_on(shards, tmp_path):
    """Another one has another folder, and takes nothing over; the same one keeps its model's commit, and its files."""
    PartialState(cpu=True)
    model = shutil.copytree(TINY / "pickscore", tmp_path / "model")

    def run(**flags):
        defaults = {"dataset_name": shards, "reward_model": model, "output_path": tmp_path / "labels.parquet"}
        args = parse_args(command_line(**{**defaults, "dtype": "float32", **flags}))
        return start_run(open_data(args)[0], args)

    folder, _, source = run()
    (folder / "run.json").write_text(json.dumps({**source, "revision": "a" * 40}))
    same = {"dataset_name": shutil.copytree(shards.parent, tmp_path / "same") / "*.parquet"}
    for flags in ({}, same, {"batch_size": 5}, {"score_range": [-1, 1]}, {"human_label_column": "label_1"}):
        assert run(**flags)[::2] == [folder, {**source, "revision": "a" * 40}]
    for column, value in (("caption", "a small blue cross"), ("jpg_1", b"")):
        shutil.copytree(shards.parent, tmp_path / column)
        edited = tmp_path / column / "train-00002.parquet"
        table = pq.read_table(edited)
        table = with_column(table, column, [*table[column].to_pylist()[:-1], value])
        pq.write_table(table, edited, row_group_size=16)
    others = [
        {"dataset_name": tmp_path / "caption" / "*.parquet"},
        {"dataset_name": tmp_path / "jpg_1" / "*.parquet"},
        {"image_columns": ["jpg_1", "jpg_0"]},
        {"dtype": "bfloat16"},
        {"reward_model": TINY / "pickscore"},
    ]
    assert len({folder, *(run(**flags)[0] for flags in others)}) == 1 + len(others)

    (model / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="--reward_model .*model has other files than when the run in .* began. Put"):
        run()
    shutil.rmtree(model)
    assert run()[0] == folder
    (tmp_path / "labels.parquet").touch()  # of that run: another is refused
    assert run()[0] == folder
    with pytest.raises(UserError, match="labels.parquet exists. Move it away"):
        run(dtype="float16")


# Several processes


def run_several(server, num_processes, args):
    """On the CPU, each with as many threads as this one, as their number changes the last bit of a score."""
    threads = str(torch.get_num_threads())
    assert server.run(args, num_processes, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=threads) == 0, server.output()


def test_a_run_goes_on_with_another_number_of_processes(server, shards, whole, tmp_path):
    path = tmp_path / "labels.parquet"
    args = flags_of(path, dataset_name=shards)
    process = server.start(args)
    wait_for(lambda: len(pieces_of(path)) > 4)
    assert stop(server, process) == -signal.SIGKILL
    before = pieces_of(path)
    run_several(server, 2, args)
    assert 4 < len(before) < 2 * NUM_FILES and path.read_bytes() == whole.read_bytes()
    assert not path.with_suffix(".scores").exists()


def write_arrow(folder, table):
    """A data set that is not Parquet: its folder."""
    (folder / "arrow" / "train").mkdir(parents=True)
    with pa.ipc.new_stream(folder / "arrow" / "train" / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "arrow"


def test_more_processes_than_pieces(server, shards, whole, tmp_path):
    """Of a data set that is not Parquet, and then a part of it."""
    tables = [pq.read_table(path) for path in sorted(shards.parent.iterdir())]
    folder = write_arrow(tmp_path, pa.concat_tables(tables))
    run_several(server, 2, flags_of(tmp_path / "labels.parquet", dataset_name=folder))
    assert_same_labels(tmp_path / "labels.parquet", whole, atol=1e-6)
    relabel(dataset_name=folder, split="train[2:5]", output_path=tmp_path / "part.parquet")
    part, rows = pq.read_table(tmp_path / "part.parquet"), pq.read_table(whole).slice(2, 3)
    assert part["image_0_uid"] == rows["image_0_uid"]
    np.testing.assert_allclose(part["score_0"], rows["score_0"], rtol=0, atol=1e-6)


# A data set on the Hub


@pytest.mark.parametrize("streaming", [True, None])
def test_a_data_set_on_the_hub(streaming, hub, server, whole, tmp_path):
    def copies():
        return {path for path in hub.home.rglob("*") if path.is_file() and path.stat().st_size > 30_000}

    before = copies()
    flags = {"dataset_name": "ada/pairs", "streaming": streaming}
    assert server.run(flags_of(tmp_path / "labels.parquet", **flags)) == 0, server.output()
    assert_same_labels(tmp_path / "labels.parquet", whole, atol=1e-6)
    assert bool(copies() - before) == (streaming is None)
    metadata = metadata_of(tmp_path / "labels.parquet")
    assert metadata["dataset_name"] == "ada/pairs" and re.fullmatch("[0-9a-f]{40}", metadata["dataset_revision"])


def test_labels_are_uploaded(hub, server, tmp_path):
    """With a card from which `load_dataset` knows what to read; again, without any model, if the Hub failed."""
    repo, path = hub.root / "ada" / "labelled", tmp_path / "labels.parquet"
    shutil.copytree(TINY / "pickscore", tmp_path / "model")
    flags = {"dataset_name": TINY / "pairs", "dataset_split_name": "test", "hub_dataset_id": "ada/labelled"}
    args = flags_of(path, reward_model=tmp_path / "model", push_to_hub=True, **flags)
    hub.read_only.set()
    assert server.run(args) != 0
    assert re.search(r"(?s)--push_to_hub: .*labels.parquet is written, and cannot be up.*\nStart the", server.output())
    labels = path.read_bytes()
    hub.read_only.clear()
    shutil.rmtree(tmp_path / "model")
    assert server.run(args) == 0, server.output()
    assert names_in(repo) - {".gitattributes"} == {"README.md", "labels.parquet"}
    assert not path.with_suffix(".scores").exists()
    assert (repo / "labels.parquet").read_bytes() == path.read_bytes() == labels and hub.private["ada/labelled"]
    data = datasets.load_dataset(str(repo), cache_dir=tmp_path / "cache")
    assert list(data) == ["test"]
    assert data["test"]["soft_label_0"][:] == pq.read_table(path)["soft_label_0"].to_pylist()
    card = (repo / "README.md").read_text()
    assert json.dumps({"reward_model": "model"})[1:-1] in card
    assert not [file for file in repo.rglob("*.*") if file.is_file() and str(tmp_path).encode() in file.read_bytes()]
    assert server.run(args) != 0  # now it is finished
    assert server.run(flags_of(tmp_path / "other" / "labels.parquet", push_to_hub=True, **flags)) != 0
    assert "cannot be uploaded: ada/labelled has a labels.parquet already" in server.output()
    others = flags_of(tmp_path / "other" / "others.parquet", push_to_hub=True, **flags)
    assert server.run(others) == 0, server.output()
    assert (repo / "others.parquet").exists() and (repo / "README.md").read_text() == card


def test_streaming_is_for_parquet(tmp_path):
    saved = write_arrow(tmp_path, pq.read_table(TINY / "pairs" / "test.parquet"))
    with pytest.raises(UserError, match="--dataset_name .*arrow .*--streaming reads whole splits of Parquet"):
        relabel(dataset_name=saved, streaming=True, output_path=tmp_path / "labels.parquet")
