"""--streaming: training on Parquet files where they lie."""

import hashlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import hub_server
import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from conftest import ROOT, TINY, damage, read_logs, same_weights, split_pairs, train, train_flags, write_pairs

import train_smpo_sd15
from train_smpo_sd15 import LORA_FILE, UserError, decode_image, load_data, parse_args, select_pairs, streamed_batches


FAST = {"label_column": "label_0", "noising": "forward", "streaming": True, "checkpointing_steps": 100}
datasets = pytest.importorskip("datasets", minversion="5.1", reason="refused by the scripts")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three files of the tiny training pairs, in row groups of 16."""
    return split_pairs(tmp_path_factory.mktemp("shards") / "data", 200)


@pytest.fixture
def steps(shards, tmp_path, monkeypatch):
    """`steps(count, rank, num_processes, state)`: (pairs, state after it) of each optimiser step of a stream."""
    monkeypatch.setattr(train_smpo_sd15, "MIXED_ROW_GROUPS", 4)
    Accelerator(cpu=True)  # the logger asks it which process this is

    def draw(count, rank=0, num_processes=1, state=None, **flags):
        flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "proportion_empty_prompts": 0, **flags}
        args = parse_args(train_flags(tmp_path / "out", **{"dataset_name": shards, **FAST, **flags}))
        pairs = select_pairs(load_data("dataset_split_name", args, streaming=True), 1000, args)
        accelerator = SimpleNamespace(process_index=rank, num_processes=num_processes)
        stream, drawn = streamed_batches(pairs, state, accelerator, args), []
        for _ in range(count):
            captions = []
            while len(captions) < args.train_batch_size * args.gradient_accumulation_steps:
                batch = next(stream)
                pictures = (batch["pixel_values"][i :: len(batch["captions"])] for i in range(len(batch["captions"])))
                pictures = [hashlib.sha256(both.numpy().tobytes()).hexdigest() for both in pictures]
                captions += zip(batch["captions"], batch["timesteps"].tolist(), batch["seeds"], pictures)
            drawn.append((captions, batch["state"]))
        return drawn

    return draw


def is_readable(data):
    try:
        return decode_image(data) is not None
    except ValueError:
        return False


def test_an_epoch_of_a_stream(steps, shards):
    """Every pair once, row groups mixed, in another order in the next epoch, and with other draws."""
    table = pq.read_table(TINY / "pairs" / "train.parquet", columns=["caption", "label_0", "jpg_0"]).to_pylist()
    expected = sorted(row["caption"] for row in table if row["label_0"] != 0.5 and is_readable(row["jpg_0"]))
    one_by_one = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
    drawn = [pair for pairs, _ in steps(2 * len(expected), **one_by_one) for pair in pairs]
    first, second = drawn[: len(expected)], drawn[len(expected) :]
    assert sorted(caption for caption, *_ in first) == expected
    assert sorted(caption for caption, *_ in second) == expected
    assert [caption for caption, *_ in first] != [caption for caption, *_ in second]
    assert len({tuple(seeds) for _, _, seeds, _ in drawn}) == len(drawn)


def test_bad_pairs_in_a_row_end_a_stream_only_if_none_can_be_read(steps, tmp_path, monkeypatch):
    """Of two pairs, which change places from epoch to epoch, the bad one may come twice in a row."""
    path = tmp_path / "pairs.parquet"
    one = {"dataset_name": path, "label_column": "mine", "human_label_column": "none"}
    one |= {"train_batch_size": 1, "gradient_accumulation_steps": 1}
    good = pq.read_table(TINY / "pairs" / "test.parquet")["jpg_0"][0].as_py()
    write_pairs(path, rows=2, row_group_size=1, mine=[0.9, 0.9], jpg_0=[good, b"x"])
    assert len(steps(20, **one)) == 20
    write_pairs(path, rows=2, row_group_size=1, mine=[0.9, 0.9], jpg_0=[b"x", b"x"])
    for limit, found in ((10_000, 4), (3, 3)):
        monkeypatch.setattr(train_smpo_sd15, "MAX_BAD_IN_A_ROW", limit)
        with pytest.raises(UserError, match=f"None of {found} pairs in a row of .* can be read, "):
            steps(1, **one)


def test_held_out_pairs_of_a_stream_are_copied_without_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = {"dataset_name": TINY / "pairs", "validation_split": "test", "max_train_steps": 1, "rank": 2}
    assert len(train(tmp_path / "out", **FAST, **flags)["loss"]) == 1
    copied = [path.name for path in (tmp_path / "cache").rglob("*.arrow")]
    assert copied and all("test" in name for name in copied), copied
    assert len(train(tmp_path / "slice", **FAST, **{**flags, "validation_split": "test[:4]"})["loss"]) == 1
    with pytest.raises(ValueError, match="--validation_split no cannot be loaded: it has the splits train, test"):
        train(tmp_path / "none", **FAST, **{**flags, "validation_split": "no"})


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_a_stream_goes_on_where_it_stopped(num_processes, steps):
    """From any step, into the next epoch; 2 and 3 processes share the 38 row groups."""
    rank = num_processes - 1
    whole = steps(40 // num_processes, rank, num_processes, max_train_samples=100)
    for stop in (1, 2, 27 // num_processes):
        rest = steps(len(whole) - stop, rank, num_processes, whole[stop - 1][1], max_train_samples=100)
        assert [pairs for pairs, _ in rest] == [pairs for pairs, _ in whole[stop:]]


def test_processes_divide_an_epoch_and_micro_batches_do_not_change_it(steps):
    parts = [[pair for pairs, _ in steps(30, rank, 2) for pair in pairs] for rank in (0, 1)]
    for part in (2, 3):  # neither draws nor pictures are those of the other process
        first, second = ({str(pair[part]) for pair in pairs} for pairs in parts)
        assert not first & second and len(first) > 100
    (pairs, state), (other, other_state) = steps(1)[0], steps(1, train_batch_size=4, gradient_accumulation_steps=1)[0]
    assert sorted(pairs) == sorted(other) and state == other_state


def test_a_file_that_breaks_off_is_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    path = tmp_path / "data" / "train-00001.parquet"
    damage(path, row_group=2, column="jpg_0")
    message = "(?s)--dataset_name .*data/.* cannot be loaded: .*within reach: mend that and resume"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", **FAST, rank=2, max_train_steps=300, dataset_name=path)


def test_streamed_pairs_train_as_others_do(shards, labels_path, tmp_path, monkeypatch):
    """All pairs in one batch and the same draws for each: the order in which they come does not matter then."""

    def draw(pairs, *key):
        return original(pairs, 0)

    original = train_smpo_sd15.Pairs.draw
    monkeypatch.setattr(train_smpo_sd15.Pairs, "draw", draw)
    flags = {"labels_path": labels_path, "max_train_samples": 8, "train_batch_size": 8, "max_train_steps": 1}
    logs = train(tmp_path / "copied", **flags)
    streamed = train(tmp_path / "streamed", dataset_name=shards / "*.parquet", streaming=True, **flags)
    for name in ("grad_norm", "std_tau", "weight", "ref_error_preferred"):  # sums of 8 pairs in another order
        np.testing.assert_allclose(streamed[name], logs[name], rtol=1e-3, err_msg=name)


def test_a_streamed_run_is_resumed_bit_for_bit(tmp_path):
    """From one epoch into the next, and past damaged pairs: two of three cannot be read."""
    table = pq.read_table(TINY / "pairs" / "train.parquet")
    images = [data[:100] if i % 3 and data else data for i, data in enumerate(table["jpg_0"].to_pylist())]
    (tmp_path / "damaged").mkdir()
    table = table.set_column(table.column_names.index("jpg_0"), "jpg_0", [images])
    pq.write_table(table, tmp_path / "damaged" / "train-0.parquet", row_group_size=16)
    flags = {**FAST, "dataset_name": tmp_path / "damaged", "max_train_samples": 20, "max_train_steps": 12}
    flags |= {"checkpointing_steps": 5, "rank": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_smpo_sd15, "MAX_BAD_SHARE", 1)
        logs = train(tmp_path / "whole", **flags)
        assert logs["skipped_pairs"][-1] > 12 and logs["epoch"][-1] > 1 and np.isfinite(logs["loss"]).all()
        for stop in (5, 10):
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / str(stop) / f"checkpoint-{stop}")
            resumed = train(tmp_path / str(stop), resume_from_checkpoint="latest", **flags)
            assert resumed["skipped_pairs"] == logs["skipped_pairs"][stop:]
            assert same_weights(tmp_path / "whole" / LORA_FILE, tmp_path / str(stop) / LORA_FILE)


def test_streaming_from_the_hub(shards, tmp_path):
    """Of files that are mostly images, a short run fetches a part; of the model all, at its start."""
    repo = tmp_path / "root" / "ada" / "pairs"
    shutil.copytree(shards, repo / "data")
    shutil.copytree(TINY / "sd15", tmp_path / "root" / "ada" / "model")
    (tmp_path / "root" / "ada" / "model" / "LICENSE").write_text("of no pipeline's concern")
    flags = {**FAST, "dataset_name": "ada/pairs", "rank": 2, "max_train_steps": 2, "train_batch_size": 1}
    flags |= {"pretrained_model_name_or_path": "ada/model", "validation_prompts": ["a red circle"]}
    flags |= {"num_validation_images": 1, "validation_inference_steps": 1}
    with hub_server.serve(tmp_path / "root") as hub:
        done = subprocess.run(
            [sys.executable, ROOT / "train_smpo_sd15.py", *train_flags(tmp_path / "out", **flags)],
            env={**os.environ, **hub.environment(tmp_path / "home")}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(read_logs(tmp_path / "out")["loss"]) == 2
        assert any(range for _, path, range in hub.requests if path.endswith(".parquet"))
        owners = ["model" if "ada/model" in path else "pairs" for _, path, _ in hub.requests]
        assert "model" in owners and owners[-1] == "pairs"
        # What the cache has not after all is asked for.
        code = "import train_smpo_sd15 as script; from types import SimpleNamespace as Args; import sys\n"
        code += "args = Args(pretrained_model_name_or_path='ada/model', revision=None, variant=None)\n"
        code += "print(script.make_pipeline(None, args, fetched=True, safety_checker=None).vae.config.latent_channels)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **hub.environment(tmp_path / "new")},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stdout == "4\n", done.stderr
    assert not list((tmp_path / "home").rglob("*.parquet"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dataset_split_name": "validation"}, "--dataset_name .* --dataset_split_name validation cannot be loaded"),
        ({"dataset_name": "saved"}, "--dataset_name saved .* cannot be loaded: .*save_to_disk"),
        ({"image_columns": ["left", "jpg_1"]}, "no column for --image_columns left"),
        ({"dataset_name": "cut"}, "--dataset_name cut .* cannot be loaded"),
        ({"dataset_name": "pictures"}, "--dataset_name pictures .* cannot be loaded.*Accepted: Parquet"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset(pq.read_table(TINY / "pairs" / "test.parquet")).save_to_disk("saved")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.parquet").write_bytes((TINY / "pairs" / "train.parquet").read_bytes()[:-50])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "train.csv").write_text("jpg_0,jpg_1\n1,2\n")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train(tmp_path / "out", **{**FAST, **flags})
