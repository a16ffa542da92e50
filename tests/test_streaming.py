"""--streaming: training on Parquet files where they lie."""

import itertools
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import hub_server
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import (
    ROOT,
    TINY,
    read_logs,
    run_script,
    split_pairs,
    train,
    train_flags,
    train_sdxl,
    unet_weights,
)
from test_standalone import LAUNCH

from train_smpo_sd15 import PairStream, StreamedPairs


FAST = {"label_column": "label_0", "noising": "forward", "streaming": True, "checkpointing_steps": 100}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three files of the tiny training pairs, in row groups of 16."""
    return split_pairs(tmp_path_factory.mktemp("shards") / "data", 200)


@pytest.fixture(scope="module")
def dataset(shards):
    """What `PairStream` knows of a data set: some pairs are not trained on."""
    PartialState()
    pairs = StreamedPairs(sorted(str(path) for path in shards.iterdir()))
    rows = np.flatnonzero(np.random.default_rng(0).random(len(pairs)) < 0.7)
    return SimpleNamespace(pairs=pairs.select_columns(["caption", "ranking_id"]), rows=rows)


def batches(dataset, count, **options):
    options = {
        "batch_size": 4,
        "num_processes": 1,
        "process_index": 0,
        "seed": 1,
        "start": 0,
        "buffer_size": 50,
        **options,
    }
    return list(itertools.islice(PairStream(dataset, **options), count))


def indices(batches):
    return [index for batch in batches for _, index, _ in batch]


# The stream


def test_pairs_are_looked_up_by_row(dataset):
    expected = pq.read_table(TINY / "pairs" / "train.parquet", columns=["caption", "ranking_id"]).to_pylist()
    for row in (0, 15, 16, 199, 200, 401, 589):
        assert dataset.pairs[row] == expected[row]
    assert len(dataset.pairs) == len(expected)


def test_an_epoch_of_a_stream(dataset):
    """Every pair once, each with what its row holds, well shuffled, and in another order in the next epoch."""
    num_batches = len(dataset.rows) // 4
    epochs = batches(dataset, 2 * num_batches)
    expected = pq.read_table(TINY / "pairs" / "train.parquet", columns=["caption", "ranking_id"]).to_pylist()
    for batch in epochs:
        for _, index, pair in batch:
            assert pair == expected[dataset.rows[index]]
    first, second = indices(epochs[:num_batches]), indices(epochs[num_batches:])
    for epoch, order in enumerate((first, second)):
        assert len(set(order)) == len(order) == 4 * num_batches
        assert all(item[0] == epoch for batch in epochs[epoch * num_batches :][:num_batches] for item in batch)
    assert first != second
    groups = dataset.rows[np.array(first[:100])] // 16
    assert np.mean(groups[1:] == groups[:-1]) < 0.6  # a buffer mixes row groups, of which it holds five or so


@pytest.mark.parametrize("start", [1, 12, 13, 50, 103, 104, 150])
def test_a_stream_goes_on_where_it_stopped(start, dataset):
    whole = batches(dataset, 220, num_processes=2, process_index=1, batch_size=2)
    assert len(dataset.rows) // 4 < 110
    assert batches(dataset, 220 - start, num_processes=2, process_index=1, batch_size=2, start=start) == whole[start:]


def test_processes_divide_an_epoch_and_micro_batches_do_not_change_it(dataset):
    num_pairs = len(dataset.rows) // 3
    parts = [indices(batches(dataset, num_pairs, num_processes=3, process_index=i, batch_size=1)) for i in range(3)]
    assert len(set(itertools.chain(*parts))) == 3 * num_pairs
    for i, part in enumerate(parts):
        wide = indices(batches(dataset, num_pairs // 8, num_processes=3, process_index=i, batch_size=8))
        assert wide == part[: len(wide)]


def test_a_file_that_breaks_off_is_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    path = tmp_path / "data" / "train-00001.parquet"
    column = pq.ParquetFile(path).metadata.row_group(2).column(pq.read_schema(path).names.index("jpg_0"))
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="(?s)train-00001.parquet after row 32 cannot be loaded.*fetch it again"):
        train(
            tmp_path / "out",
            dataset_name=tmp_path / "data" / "*.parquet",
            **{**FAST, "rank": 2, "max_train_steps": 300},
        )


# Training on it


def test_streamed_pairs_train_as_others_do(shards, labels_path, tmp_path):
    """All pairs in one batch: the order in which they come does not matter then."""
    flags = {"labels_path": labels_path, "max_train_samples": 8, "train_batch_size": 8, "max_train_steps": 3}
    logs = train(tmp_path / "copied", **flags)
    streamed = train(
        tmp_path / "streamed", dataset_name=shards / "*.parquet", streaming=True, shuffle_buffer_size=3, **flags
    )
    for name in ("loss", "grad_norm", "std_tau", "implicit_accuracy"):
        np.testing.assert_allclose(streamed[name], logs[name], rtol=1e-3)
    ours, theirs = unet_weights(tmp_path / "streamed"), unet_weights(tmp_path / "copied")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)  # sums in another order


def test_sdxl_streams_too(shards, sdxl, tmp_path):
    flags = {"label_column": "label_0", "rank": 2, "max_train_samples": 4, "train_batch_size": 4}
    logs = train_sdxl(tmp_path / "copied", sdxl, **flags)
    streamed = train_sdxl(tmp_path / "streamed", sdxl, dataset_name=shards, streaming=True, **flags)
    np.testing.assert_allclose(streamed["loss"], logs["loss"], rtol=1e-3)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Two of three pairs cannot be read."""
    table, folder = pq.read_table(TINY / "pairs" / "train.parquet"), tmp_path_factory.mktemp("damaged")
    images = [data[:100] if i % 3 and data else data for i, data in enumerate(table["jpg_0"].to_pylist())]
    table = table.set_column(table.column_names.index("jpg_0"), "jpg_0", [images])
    pq.write_table(table, folder / "train-0.parquet", row_group_size=16)
    return folder


def test_a_streamed_run_is_resumed_bit_for_bit(damaged, tmp_path):
    """From one epoch into the next, with worker processes or without, and past damaged pairs, whose successors are looked up."""
    flags = {
        **FAST,
        "dataset_name": damaged,
        "shuffle_buffer_size": 20,
        "max_train_samples": 40,
        "max_bad_fraction": 1,
    }
    logs = train(tmp_path / "whole", max_train_steps=24, dataloader_num_workers=2, **flags)
    assert logs["skipped_pairs"][-1] > 24 and logs["epoch"][-1] > 1 and np.isfinite(logs["loss"]).all()
    flags["checkpointing_steps"] = 7
    train(tmp_path / "out", max_train_steps=14, dataloader_num_workers=1, **flags)
    train(tmp_path / "out", max_train_steps=24, resume_from_checkpoint="latest", **flags)
    ours, theirs = unet_weights(tmp_path / "out"), unet_weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_stream(shards, tmp_path, monkeypatch):
    flags = {**FAST, "dataset_name": shards, "rank": 2, "max_train_steps": 4, "checkpointing_steps": 2}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_script(ROOT / "train_smpo_sd15.py", *train_flags(tmp_path / "out", **flags), cwd=tmp_path, launcher=LAUNCH)
    logs = read_logs(tmp_path / "out")
    assert len(logs["loss"]) == 4 and logs["implicit_accuracy"][0] == 0.5


def test_streaming_from_the_hub(shards, tmp_path):
    """Of files that are mostly images, a short run fetches a part."""
    repo = tmp_path / "root" / "ada" / "pairs"
    shutil.copytree(shards, repo / "data")
    flags = {**FAST, "dataset_name": "ada/pairs", "rank": 2, "shuffle_buffer_size": 16, "max_train_steps": 4}
    with hub_server.serve(tmp_path / "root") as hub:
        done = subprocess.run(
            [sys.executable, ROOT / "train_smpo_sd15.py", *train_flags(tmp_path / "out", **flags)],
            env={**os.environ, **hub.environment(tmp_path / "home")}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(read_logs(tmp_path / "out")["loss"]) == 4
        assert any(range for _, path, range in hub.requests if path.endswith(".parquet"))
    assert not list((tmp_path / "home").rglob("*.parquet"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"streaming": None, "shuffle_buffer_size": 5}, "--shuffle_buffer_size belongs to --streaming"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size must be positive"),
        (
            {"dataset_split_name": "validation"},
            "--streaming reads Parquet files in place, and .* has none of the split",
        ),
        ({"dataset_name": "saved"}, "--streaming reads Parquet files in place, and --dataset_name saved has none"),
        ({"image_0_column": "left"}, "no column for --image_0_column left"),
        ({"dataset_name": "cut"}, "1 of 1 Parquet files cannot be read"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset(pq.read_table(TINY / "pairs" / "test.parquet")).save_to_disk("saved")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.parquet").write_bytes((TINY / "pairs" / "train.parquet").read_bytes()[:-50])
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", **{**FAST, **flags})
