"""No run is lost: killed, stopped, broken and mistaken runs of train_smpo_sd15.py, with real processes and signals."""

import io
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, forget_accelerator, names_in, run_script, train, train_flags, write_pairs
from fork_server import ForkServer, wait_for
from PIL import Image
from safetensors.torch import load_file
from test_standalone import LAUNCH

import train_smpo_sd15
from train_smpo_sd15 import EXIT_STOPPED, LORA_FILE, find_checkpoints, parse_args


FAST = {"label_column": "label_0", "noising": "forward", "rank": 2, "train_batch_size": 1, "report_to": "none"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer("train_smpo_sd15", tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


def same_weights(first, second):
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps_in(folder):
    return [int(path.name.split("-")[1]) for path in find_checkpoints(folder)]


# Killed, at any moment


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="lora", marks=pytest.mark.slow),
        pytest.param({"rank": None, "optimizer": "adafactor"}, id="full"),
    ],
)
def test_a_run_killed_many_times_ends_as_the_whole_one(num_kills, flags, server, tmp_path):
    """SIGKILL, half of the times while a checkpoint is being written. The newest complete checkpoint is always usable."""
    flags = {**FAST, **flags, "max_train_steps": 50, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    assert server.run(train_flags(tmp_path / "whole", **flags)) == 0
    rng, killed, during_a_save, output_dir = random.Random(0), 0, 0, tmp_path / "killed"
    args = train_flags(output_dir, resume_from_checkpoint="latest", **flags)
    while killed < num_kills:
        before = max(steps_in(output_dir), default=0)
        process = server.start(args)
        wait_for(lambda: max(steps_in(output_dir), default=0) > before)
        if killed % 2:
            wait_for(lambda: list(output_dir.glob("partial-checkpoint-*")))
        time.sleep(rng.uniform(0, 0.005 if killed % 2 else 0.1))
        during_a_save += bool(list(output_dir.glob("partial-checkpoint-*")))
        os.killpg(process, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, "the run had ended"
        killed += 1
    assert during_a_save >= num_kills // 5
    assert server.run(args) == 0
    name = LORA_FILE if flags["rank"] else "unet/diffusion_pytorch_model.safetensors"
    assert same_weights(tmp_path / "whole" / name, output_dir / name)
    assert steps_in(output_dir) == [49, 50] and not list(output_dir.glob("partial-*"))


def test_every_checkpoint_of_a_run_leads_to_its_end(tmp_path, labels_path):
    """Accumulation, warm-up and decay, several epochs, a worker process: resumed after each of eleven steps."""
    flags = {
        "labels_path": labels_path, "rank": 2, "train_batch_size": 1, "gradient_accumulation_steps": 2,
        "max_train_steps": 12, "max_train_samples": 7, "lr_scheduler": "cosine", "lr_warmup_steps": 3,
        "checkpointing_steps": 1, "num_inversion_steps": 2, "no_hflip": None, "random_crop": True,
    }  # fmt: skip
    train(tmp_path / "whole", **flags)
    for step in range(1, 12):
        output_dir = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
        workers = step % 2  # may change, as it does not change the run
        logs = train(output_dir, resume_from_checkpoint="latest", dataloader_num_workers=workers, **flags)
        assert len(logs["loss"]) == 12 - step
        assert same_weights(tmp_path / "whole" / LORA_FILE, output_dir / LORA_FILE), step
        for file in ("optimizer.bin", "scheduler.bin"):
            whole, resumed = (torch.load(d / "checkpoint-12" / file) for d in (tmp_path / "whole", output_dir))
            torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_save_that_fails_leaves_the_last_checkpoint(server, tmp_path):
    """A real write error (files may not grow beyond 1 MB) in the middle of a run with a limit of one checkpoint."""
    flags = {**FAST, "rank": None, "max_train_steps": 200, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    process = server.start(train_flags(tmp_path / "out", **flags))
    wait_for(lambda: steps_in(tmp_path / "out"))
    resource.prlimit(process, resource.RLIMIT_FSIZE, (2**20, 2**20))
    assert server.wait() == 1
    (step,) = steps_in(tmp_path / "out")
    assert list((tmp_path / "out").glob("partial-checkpoint-*"))
    flags["max_train_steps"] = step + 2
    assert server.run(train_flags(tmp_path / "out", resume_from_checkpoint="latest", **flags)) == 0
    assert server.run(train_flags(tmp_path / "whole", **flags)) == 0
    assert same_weights(*(tmp_path / run / "unet/diffusion_pytorch_model.safetensors" for run in ("whole", "out")))


# Stopped by a signal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_ends_with_a_code_of_its_own(name, server, tmp_path):
    """It goes to the whole process group, as a terminal and Slurm send it: the data loading process takes no notice."""
    flags = {**FAST, "max_train_steps": 5000, "checkpointing_steps": 1000, "dataloader_num_workers": 1}
    process = server.start(train_flags(tmp_path / "out", **{**flags, "report_to": "tensorboard"}))
    wait_for(lambda: list((tmp_path / "out" / "logs").rglob("events*")))
    time.sleep(1)
    os.killpg(process, getattr(signal, name))
    assert server.wait() == EXIT_STOPPED == 75
    (step,) = steps_in(tmp_path / "out")
    assert 0 < step < 1000 and LORA_FILE not in names_in(tmp_path / "out")
    flags["max_train_steps"] = step + 2
    assert server.run(train_flags(tmp_path / "out", resume_from_checkpoint="latest", **flags)) == 0
    assert server.run(train_flags(tmp_path / "whole", **flags)) == 0
    assert same_weights(tmp_path / "whole" / LORA_FILE, tmp_path / "out" / LORA_FILE)


def test_a_second_ctrl_c_interrupts_at_once(server, tmp_path):
    flags = {**FAST, "max_train_steps": 5000, "checkpointing_steps": 5000, "gradient_accumulation_steps": 100_000}
    process = server.start(train_flags(tmp_path / "out", **{**flags, "report_to": "tensorboard"}))
    wait_for(lambda: list((tmp_path / "out" / "logs").rglob("events*")))
    time.sleep(1)
    os.kill(process, signal.SIGINT)
    time.sleep(0.3)
    os.kill(process, signal.SIGINT)
    assert server.wait() == 1 and not steps_in(tmp_path / "out")


# Two processes


def test_two_processes_resume_and_stop_together(tmp_path, monkeypatch):
    """DDP over gloo: a resumed run ends bit for bit as the whole one; a signal to one process stops and saves both."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = {**FAST, "max_train_steps": 4, "checkpointing_steps": 2}
    script = ROOT / "train_smpo_sd15.py"
    run_script(script, *train_flags(tmp_path / "whole", **flags), cwd=tmp_path, launcher=LAUNCH)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train_flags(tmp_path / "resumed", resume_from_checkpoint="latest", **flags)
    run_script(script, *resumed, cwd=tmp_path, launcher=LAUNCH)
    assert same_weights(tmp_path / "whole" / LORA_FILE, tmp_path / "resumed" / LORA_FILE)

    flags = {**flags, "max_train_steps": 5000, "checkpointing_steps": 5000, "report_to": "tensorboard"}
    command = [sys.executable, *LAUNCH, str(script), *train_flags(tmp_path / "stopped", **flags)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list((tmp_path / "stopped" / "logs").rglob("events*")), 120)
    time.sleep(2)
    children = (Path("/proc") / str(launcher.pid) / "task" / str(launcher.pid) / "children").read_text()
    os.kill(int(children.split()[-1]), signal.SIGUSR1)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0 and re.search(r"exitcode *: 75", output), output
    (step,) = steps_in(tmp_path / "stopped")
    assert step > 0 and len(list((tmp_path / "stopped" / f"checkpoint-{step}").glob("random_states_*.pkl"))) == 2


# The same run, or not at all


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 2e-4}, "--learning_rate: 0.0001 then, 0.0002 now"),
        ({"train_batch_size": 2}, "--train_batch_size: 1 then, 2 now"),
        ({"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps: 1 then, 3 now"),
        ({"seed": 5}, "--seed: 1 then, 5 now"),
        ({"gamma": 3}, "--gamma: 10 then, 3.0 now"),
        ({"noising": "ddim"}, "--noising: forward then, ddim now"),
        ({"rank": 4}, "--rank: 2 then, 4 now"),
        ({"rank": None}, "--rank: 2 then, None now"),
        ({"max_train_samples": 9}, "pairs: 369 then, 9 now"),
        ({"human_label_column": "none"}, "--human_label_column: label_0 then, none now"),
        ({"dataset_name": "relabelled"}, "of another run:\npairs_and_labels_sha256: "),
        ({"mixed_precision": "bf16"}, "mixed_precision: no then, bf16 now"),
        ({"lr_scheduler": "cosine", "max_train_steps": 9}, "--max_train_steps: 1 then, 9 now"),
        ({"pretrained_model_name_or_path": "copy"}, "--pretrained_model_name_or_path: "),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_not_resumed(changes, message, tmp_path, one_step):
    if "pretrained_model_name_or_path" in changes:
        changes = {"pretrained_model_name_or_path": shutil.copytree(TINY / "sd15", tmp_path / "copy")}
    if "dataset_name" in changes:  # the same pairs with the other winner
        table = pq.read_table(TINY / "pairs" / "train.parquet")
        flipped = pa.array(1 - table["label_0"].to_numpy())
        table = table.set_column(table.schema.get_field_index("label_0"), "label_0", flipped)
        pq.write_table(table, tmp_path / "relabelled.parquet")
        changes = {"dataset_name": tmp_path / "relabelled.parquet"}
    with pytest.raises(ValueError, match=f"(?s)checkpoint-1 is .*{message}.*--resume_despite_changes"):
        train(tmp_path / "out", resume_from_checkpoint=one_step, **{**FAST, "max_train_steps": 1, **changes})


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """A checkpoint after one step."""
    output_dir = tmp_path_factory.mktemp("one-step") / "out"
    train(output_dir, **FAST, max_train_steps=1, checkpointing_steps=1)
    forget_accelerator()
    return output_dir / "checkpoint-1"


def test_what_does_not_change_a_run_may_change(tmp_path, one_step):
    """A longer run, other data paths and settings of the machine; and anything at all, on request."""
    copy = shutil.copytree(TINY / "pairs", tmp_path / "pairs")
    flags = {**FAST, "max_train_steps": 2, "dataset_name": copy, "vae_encode_batch_size": 1, "offload": True}
    train(tmp_path / "longer", resume_from_checkpoint=one_step, **flags)
    assert (tmp_path / "longer" / LORA_FILE).is_file()
    flags = {**flags, "learning_rate": 3e-4, "resume_despite_changes": True, "report_to": "tensorboard"}
    logs = train(tmp_path / "changed", resume_from_checkpoint=one_step, **flags)
    assert len(logs["loss"]) == 1


def test_latest_is_the_newest_complete_checkpoint_or_the_start(tmp_path):
    out = tmp_path / "out"
    assert parse_args(train_flags(out, resume_from_checkpoint="latest")).resume_from_checkpoint is None
    for name in ("checkpoint-9", "checkpoint-10", "partial-checkpoint-11", "checkpoint-12-old", "checkpoint-last"):
        (out / name).mkdir(parents=True)
    assert parse_args(train_flags(out, resume_from_checkpoint="latest")).resume_from_checkpoint == str(
        out / "checkpoint-10"
    )
    with pytest.raises(ValueError, match="checkpoint-10 cannot be loaded.*training_args.json"):
        train(out, resume_from_checkpoint="latest", **FAST)


def test_an_older_checkpoint_does_not_branch_off_in_the_same_folder(tmp_path):
    """The newer ones would be taken for the latest, and the limit would delete what the branch saves."""
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="checkpoint-9 is older than checkpoint-10 in --output_dir"):
        parse_args(train_flags(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-9"))
    args = parse_args(train_flags(tmp_path / "other", resume_from_checkpoint=tmp_path / "checkpoint-9"))
    assert args.resume_from_checkpoint == str(tmp_path / "checkpoint-9")


def test_a_folder_in_use_is_not_trodden_on(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for name in ("checkpoint-10", "partial-checkpoint-11", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty, it holds checkpoint-10, logs, .*--overwrite_output_dir"):
        parse_args(train_flags(tmp_path, **FAST))
    train(tmp_path, overwrite_output_dir=True, max_train_steps=1, **FAST)
    assert names_in(tmp_path) == {"README.md", LORA_FILE, "thesis.txt", "training_args.json"}


# Numbers gone wrong


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    calls = []

    def training_step(*args):
        loss, metrics = original(*args)
        calls.append(None)
        return (loss * float("nan") if len(calls) == 3 else loss), metrics

    original = train_smpo_sd15.training_step
    monkeypatch.setattr(train_smpo_sd15, "training_step", training_step)
    flags = {**FAST, "report_to": "tensorboard", "lr_scheduler": "linear", "gradient_accumulation_steps": 2}
    logs = train(tmp_path, max_train_steps=3, checkpointing_steps=1, **flags)
    assert logs["nonfinite_steps"] == [0, 1, 1] and np.isnan(logs["grad_norm"]).tolist() == [False, True, False]
    np.testing.assert_allclose(logs["lr"], [1e-4, 2e-4 / 3, 2e-4 / 3])  # the schedule waits
    first, second, third = (tmp_path / f"checkpoint-{step}" / LORA_FILE for step in (1, 2, 3))
    assert same_weights(first, second) and not same_weights(second, third)


def test_numbers_that_stay_wrong_stop_the_run(tmp_path):
    """A learning rate that blows the weights up: the error names the last checkpoint."""
    with pytest.raises(
        RuntimeError, match="not finite in 3 steps in a row, up to step 4.*The last checkpoint is .*checkpoint-3"
    ):
        train(
            tmp_path, learning_rate=1e30, max_nonfinite_steps=3, max_train_steps=9, checkpointing_steps=3, **FAST
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="There is no checkpoint yet"):
        train(tmp_path / "other", learning_rate=1e30, max_nonfinite_steps=1, max_train_steps=9, **FAST)


def test_an_error_ends_the_process_and_its_workers(tmp_path):
    """The workers do not hear the SIGTERM by which Python ends its children."""
    flags = {
        **FAST,
        "learning_rate": 1e30,
        "max_nonfinite_steps": 1,
        "max_train_steps": 9,
        "dataloader_num_workers": 2,
    }
    command = [sys.executable, str(ROOT / "train_smpo_sd15.py"), *train_flags(tmp_path / "out", **flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not finite in 1 steps in a row" in done.stderr


def test_another_accumulation_starts_at_a_whole_step(tmp_path, one_step):
    """On request a run goes on with another accumulation; its first step is a whole one."""
    flags = {**FAST, "max_train_steps": 2, "gradient_accumulation_steps": 3, "resume_despite_changes": True}
    logs = train(tmp_path / "out", resume_from_checkpoint=one_step, **{**flags, "report_to": "tensorboard"})
    assert len(logs["loss"]) == 1 and logs["epoch"] == [pytest.approx(2 * 3 / 369)]
    assert logs["std_tau"][0] == pytest.approx(1.0, abs=0.1)  # forward noise; a part of a step would be scaled down


# Bad data


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


PICTURE = Image.effect_noise((80, 64), 60)
UNREADABLE = {
    "truncated": encoded(PICTURE.convert("RGB"), "JPEG")[:700],
    "empty": b"",
    "missing": None,
    "no picture": b"<html>404</html>",
    "bomb": bomb(),
}
READABLE = {
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "palette": encoded(PICTURE.convert("P"), "PNG", transparency=3),
    "alpha": encoded(PICTURE.convert("RGBA"), "PNG"),
    "grey": encoded(PICTURE, "PNG"),
    "16 bits": encoded(PICTURE.convert("I;16"), "PNG"),
    "animated": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    "rotated": encoded(PICTURE.convert("RGB"), "JPEG", exif=Image.Exif()),
}


@pytest.mark.parametrize("name", [*UNREADABLE, *READABLE, "no caption"])
def test_bad_pairs_give_way_and_are_counted(name, tmp_path, caplog):
    """One pair in eight is odd, at either side; every batch stays full and the reason is logged."""
    table = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 8)
    columns = {column: table[column].to_pylist() for column in ("jpg_0", "jpg_1", "caption")}
    if name == "no caption":
        columns["caption"][2] = None
    else:
        columns[f"jpg_{len(name) % 2}"][2] = {**UNREADABLE, **READABLE}[name]
    path = write_pairs(tmp_path / "pairs.parquet", mine=[0.9] * 8, **columns)
    logs = train(
        tmp_path / "out", dataset_name=path, max_train_steps=2, human_label_column="none",
        **{**FAST, "label_column": "mine", "train_batch_size": 4, "report_to": "tensorboard"},
    )  # fmt: skip
    assert logs["skipped_pairs"][-1] == (0 if name in READABLE else 1)
    assert ("row 2 of the data set: " in caplog.text) == (name not in READABLE)
    assert np.isfinite(logs["loss"]).all()


def test_too_many_bad_pairs_stop_the_run_and_keep_it(tmp_path):
    images = pq.read_table(TINY / "pairs" / "test.parquet")["jpg_0"].to_pylist()[:8]
    path = write_pairs(tmp_path / "pairs.parquet", mine=[0.9] * 8, jpg_0=images[:5] + [b"x"] * 3)
    flags = {**FAST, "label_column": "mine", "human_label_column": "none", "dataset_name": path, "train_batch_size": 8}
    with pytest.raises(
        ValueError,
        match=r"12 of the 28 pairs drawn so far cannot be read, more than --max_bad_fraction 0.1. The last: row \d of the data"
        " set: not a readable image .*checkpoint-2. Mend the data or allow more",
    ):
        train(tmp_path / "out", max_train_steps=9, **flags)
    assert steps_in(tmp_path / "out") == [2]
    flags.update(max_bad_fraction=0.5, max_train_steps=4, resume_from_checkpoint="latest")
    train(tmp_path / "out", **flags)


# Trust


def test_only_safetensors_are_loaded_as_weights(tmp_path):
    base = shutil.copytree(TINY / "sd15", tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*base cannot be loaded: .*safetensors"):
        train(tmp_path / "out", pretrained_model_name_or_path=base, **FAST)


def test_a_checkpoint_is_read_without_unpickling_code(tmp_path, one_step, monkeypatch):
    """Every torch.load of a resumed run is the one that builds tensors and numbers only."""
    seen = []

    def load(*args, **kwargs):
        seen.append(kwargs.get("weights_only"))
        return original(*args, **kwargs)

    original = torch.load
    monkeypatch.setattr(torch, "load", load)
    train(tmp_path / "out", resume_from_checkpoint=one_step, **{**FAST, "max_train_steps": 2})
    assert len(seen) >= 3 and set(seen) == {True}  # optimiser, schedule, random states


def test_no_token_and_no_open_door_in_the_output(tmp_path, monkeypatch):
    """A token is in no file, and nothing is for everyone to write, whatever the umask."""
    os.umask(0)
    uploaded = []
    monkeypatch.setattr(
        train_smpo_sd15, "create_repo", lambda **kwargs: type("Repo", (), {"repo_id": kwargs["repo_id"]})
    )
    monkeypatch.setattr(train_smpo_sd15, "upload_folder", lambda **kwargs: uploaded.append(kwargs))
    train(
        tmp_path / "out", push_to_hub=True, hub_token="hf_SECRET", hub_model_id="me/model", checkpointing_steps=1,
        **{**FAST, "report_to": "tensorboard", "max_train_steps": 1},
    )  # fmt: skip
    assert uploaded[0]["token"] == "hf_SECRET" and uploaded[0]["repo_id"] == "me/model"
    files = list((tmp_path / "out").rglob("*"))
    assert len(files) > 10
    for path in files:
        assert not path.stat().st_mode & stat.S_IWOTH, path
        assert path.is_dir() or b"hf_SECRET" not in path.read_bytes(), path
