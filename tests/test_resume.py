"""No run is lost: killed, stopped, broken and mistaken runs of train_smpo_sd15.py, with real processes and signals."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TWO_PROCESSES,
    forget_accelerator,
    names_in,
    same_weights,
    split_pairs,
    train,
    train_flags,
    write_pairs,
)
from fork_server import wait_for
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import train_smpo_sd15
from train_smpo_sd15 import KOHYA_LORA_FILE, LORA_FILE, RECORD_FILE, UserError, find_checkpoints, parse_args


FAST = {"label_column": "label_0", "noising": "forward", "rank": 2, "train_batch_size": 1, "report_to": "none"}
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """A checkpoint after one step."""
    output_dir = tmp_path_factory.mktemp("one-step") / "out"
    train(output_dir, **FAST, max_train_steps=1)
    return output_dir / "checkpoint-1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, labels_path):
    """A finished run of several epochs with accumulation, warm-up, decay, a checkpoint a step; and its flags."""
    flags = {
        "labels_path": labels_path, "rank": 2, "train_batch_size": 1, "gradient_accumulation_steps": 2,
        "max_train_steps": 8, "max_train_samples": 7, "lr_scheduler": "cosine", "lr_warmup_steps": 3,
        "checkpointing_steps": 1, "num_inversion_steps": 2, "no_hflip": None,
    }  # fmt: skip
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    train(output_dir, **flags)
    return output_dir, flags


def steps_in(folder):
    return [int(path.name.split("-")[1]) for path in find_checkpoints(folder)]


# Killed, at any moment


@pytest.mark.parametrize("flags", [
    pytest.param({"rank": None, "optimizer": "adafactor"}, id="full"),
    pytest.param({}, id="lora", marks=pytest.mark.slow),
    pytest.param({"streaming": True}, id="streamed", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_killed_many_times_ends_as_the_whole_one(num_kills, flags, server, tmp_path):
    """SIGKILL, half of the times while a checkpoint is being written. The newest complete one is always usable."""
    last = 14 + 2 * num_kills
    flags = {**FAST, **flags, "max_train_steps": last, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    if "streaming" in flags:
        flags["dataset_name"] = split_pairs(tmp_path / "shards", 200)
    assert server.run(train_flags(tmp_path / "whole", **flags)) == 0
    rng, killed, during_a_save, output_dir = random.Random(0), 0, 0, tmp_path / "killed"
    args = train_flags(output_dir, resume_from_checkpoint="latest", **flags)
    while killed < num_kills:
        before = max(steps_in(output_dir), default=0)
        process = server.start(args)
        wait_for(lambda: max(steps_in(output_dir), default=0) > before)
        if killed % 2:
            wait_for(lambda: list(output_dir.glob("partial-checkpoint-*")))
        if killed % 4 != 1:  # or at once: a save may take no longer than this
            time.sleep(rng.uniform(0, 0.005 if killed % 2 else 0.1))
        during_a_save += bool(list(output_dir.glob("partial-checkpoint-*")))
        os.killpg(process, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, "the run had ended"
        killed += 1
    assert during_a_save >= num_kills // 5
    assert server.run(args) == 0
    name = LORA_FILE if flags["rank"] else UNET_FILE
    assert same_weights(tmp_path / "whole" / name, output_dir / name)
    assert steps_in(output_dir) == [last - 1, last] and not list(output_dir.glob("partial-*"))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_every_checkpoint_of_a_run_leads_to_its_end(step, whole, tmp_path):
    output_dir, flags = whole
    shutil.copytree(output_dir / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    workers = step % 2  # may change, as it does not change the run
    logs = train(tmp_path, resume_from_checkpoint="latest", dataloader_num_workers=workers, **flags)
    assert len(logs["loss"]) == 8 - step
    assert same_weights(output_dir / LORA_FILE, tmp_path / LORA_FILE)
    ends = [folder / "checkpoint-8" for folder in (tmp_path, output_dir)]
    for file in ("optimizer.bin", "scheduler.bin"):
        torch.testing.assert_close(*(torch.load(end / file) for end in ends), rtol=0, atol=0)
    ours, theirs = (json.loads((end / RECORD_FILE).read_text())["progress"] for end in ends)
    assert ours == theirs


def test_a_damaged_checkpoint_is_named(one_step, tmp_path):
    damaged = shutil.copytree(one_step, tmp_path / "checkpoint-1")
    os.truncate(damaged / "optimizer.bin", 1000)
    pattern = "(?s)--resume_from_checkpoint .*checkpoint-1 cannot be loaded.*the one before"
    with pytest.raises(UserError, match=pattern):
        train(tmp_path / "out", resume_from_checkpoint=damaged, **FAST)


def test_a_save_that_fails_leaves_the_last_checkpoint(server, tmp_path):
    """A real write error (files may not grow beyond 1 MB) in the middle of a run with a limit of one checkpoint."""
    flags = {**FAST, "rank": None, "max_train_steps": 200, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    process = server.start(train_flags(tmp_path / "out", **flags))
    wait_for(lambda: steps_in(tmp_path / "out"))
    resource.prlimit(process, resource.RLIMIT_FSIZE, (2**20, 2**20))
    assert server.wait() == 1
    (step,) = steps_in(tmp_path / "out")
    assert list((tmp_path / "out").glob("partial-checkpoint-*"))
    last = re.escape(str(tmp_path / "out" / f"checkpoint-{step}"))
    pattern = rf"UserError: --output_dir .*: checkpoint-{step + 1} cannot be written .*The last checkpoint is {last}\."
    assert re.search(pattern, server.output(), re.DOTALL), server.output()
    flags["max_train_steps"] = step + 2
    assert server.run(train_flags(tmp_path / "out", resume_from_checkpoint="latest", **flags)) == 0
    assert server.run(train_flags(tmp_path / "whole", **flags)) == 0
    assert same_weights(tmp_path / "whole" / UNET_FILE, tmp_path / "out" / UNET_FILE)


# Stopped by a signal


def steps_shown(server):
    """The optimiser steps that the progress bar of the newest run has come to, -1 before there is one."""
    return max(map(int, re.findall(r"(\d+)/5000 \[", server.output())), default=-1)


def test_a_signal_saves_and_ends_with_a_code_of_its_own(server, tmp_path):
    """It goes to the whole process group, as a terminal and Slurm send it: the worker takes no notice."""
    flags = {**FAST, "max_train_steps": 5000, "checkpointing_steps": 5000, "dataloader_num_workers": 1}
    out, before = tmp_path / "out", [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = server.start(train_flags(out, resume_from_checkpoint="latest", **flags))
        wait_for(lambda: steps_shown(server) > before[-1])
        os.killpg(process, number)
        assert server.wait() == train_smpo_sd15.EXIT_STOPPED == 75
        before.append(steps_in(out)[-1])
    assert steps_in(out) == before[1:] == sorted(set(before[1:])) and LORA_FILE not in names_in(out)
    flags["max_train_steps"] = before[-1] + 2
    assert server.run(train_flags(out, resume_from_checkpoint="latest", **flags)) == 0
    assert server.run(train_flags(tmp_path / "whole", **flags)) == 0
    assert same_weights(tmp_path / "whole" / LORA_FILE, out / LORA_FILE)


def test_a_second_ctrl_c_interrupts_at_once(server, tmp_path):
    """Until then no other run starts in its folder."""
    flags = {**FAST, "max_train_steps": 5000, "gradient_accumulation_steps": 10_000}
    process = server.start(train_flags(tmp_path / "out", **flags))
    wait_for(lambda: steps_shown(server) == 0)
    with pytest.raises(UserError, match=f"out is in use by process {process}"):
        train(tmp_path / "out", resume_from_checkpoint="latest", **flags)
    os.kill(process, signal.SIGINT)
    time.sleep(0.3)
    os.kill(process, signal.SIGINT)
    assert server.wait() == 1 and not steps_in(tmp_path / "out") and "KeyboardInterrupt" in server.output()


def test_two_processes_resume_and_stop_together(server, tmp_path):
    """DDP over gloo, streamed where it can be, resumed bit for bit; a signal to one process stops and saves both."""
    streaming = hasattr(datasets.IterableDataset, "reshard") or None
    flags = {**FAST, "streaming": streaming, "max_train_steps": 4, "checkpointing_steps": 2}
    flags["dataset_name"] = split_pairs(tmp_path / "shards", 200)
    assert server.run(train_flags(tmp_path / "whole", **flags), **TWO_PROCESSES) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    resumed = train_flags(tmp_path / "out", resume_from_checkpoint="latest", **flags)
    assert server.run(resumed) == 1 and "of another run:\nnum_processes: 2 then, 1 now\n" in server.output()
    assert server.run(resumed, **TWO_PROCESSES) == 0
    assert same_weights(tmp_path / "whole" / LORA_FILE, tmp_path / "out" / LORA_FILE)

    flags |= {"max_train_steps": 5000, "checkpointing_steps": 5000, "resume_from_checkpoint": "latest"}
    process = server.start(train_flags(tmp_path / "out", **flags), **TWO_PROCESSES)
    wait_for(lambda: steps_shown(server) > 4)
    os.kill(process, signal.SIGUSR1)
    assert server.wait() == train_smpo_sd15.EXIT_STOPPED
    newest = find_checkpoints(tmp_path / "out")[-1]
    assert steps_in(newest.parent)[-1] > 4 and {"random_states_0.pkl", "random_states_1.pkl"} < names_in(newest)


# The same run, or not at all


def test_another_run_is_not_resumed(tmp_path, one_step):
    """All that differs is named; of the data, the same pairs with the other winner."""
    table = pd.read_parquet(TINY / "pairs" / "train.parquet")
    table.assign(label_0=1 - table["label_0"]).to_parquet(tmp_path / "relabelled.parquet")
    base = shutil.copytree(TINY / "sd15", tmp_path / "base")
    changes = {
        "learning_rate": (1e-4, 2e-4), "train_batch_size": (1, 2), "gradient_accumulation_steps": (1, 3),
        "seed": (1, 5), "beta_dpo": (2000, 10.0), "gamma": (10, 3.0), "noising": ("forward", "renoise"),
        "num_inversion_steps": (None, 3), "rank": (2, 4), "lora_alpha": (2, 4), "max_train_steps": (1, 9),
        "lr_scheduler": ("constant_with_warmup", "cosine"), "optimizer": ("adamw", "adafactor"),
        "caption_column": ("caption", "image_0_uid"), "human_label_column": ("label_0", "none"),
        "pretrained_model_name_or_path": (TINY / "sd15", base), "mixed_precision": ("no", "bf16"),
        "pretrained_vae_model_name_or_path": (None, base),
    }  # fmt: skip
    flags = {**FAST, "dataset_name": tmp_path / "relabelled.parquet", "resume_from_checkpoint": one_step}
    with pytest.raises(UserError, match="checkpoint-1 is of another run:\n") as error:
        train(tmp_path / "out", **{**flags, **{name: now for name, (_, now) in changes.items()}})
    changes["renoise_at"] = (None, "last_move")  # goes with the noising
    expected = {f"--{name}: {then} then, {now} now" for name, (then, now) in changes.items()}
    _, *named, hashes, _ = [line.replace("mixed_p", "--mixed_p") for line in str(error.value).splitlines()]
    assert set(named) == expected and hashes.startswith("pairs_and_labels_sha256: ")
    # Nor is one whose pairs are others with the same labels.
    forget_accelerator()  # and its precision
    table.assign(caption=table["caption"] + "!").to_parquet(tmp_path / "others.parquet")
    with pytest.raises(UserError, match="is of another run:\npairs_and_labels_sha256: .*\nGive what"):
        train(tmp_path / "out", **{**flags, "dataset_name": tmp_path / "others.parquet"})


def test_every_flag_is_part_of_the_run_or_may_change(tmp_path):
    """A new flag has to be put into one of the two."""
    may_change = """
        dataset_name dataset_split_name labels_path key_columns max_train_samples
        dataloader_num_workers num_train_epochs max_train_steps mixed_precision
        gradient_checkpointing offload allow_tf32 report_to validation_split validation_prompts num_validation_images
        validation_steps validation_inference_steps output_dir checkpointing_steps checkpoints_total_limit
        resume_from_checkpoint push_to_hub hub_public hub_model_id
    """.split()
    assert sorted([*train_smpo_sd15.SAME_RUN, *may_change]) == sorted(vars(parse_args(train_flags(tmp_path / "out"))))


def test_what_does_not_change_a_run_may_change(tmp_path, one_step, monkeypatch):
    """A longer run, another path of the data, settings of the machine. wandb goes on with its run, and gets numbers
    and pictures. Nothing of a checkpoint is unpickled as code: every torch.load is the one that builds tensors and
    numbers only."""
    wandb = pytest.importorskip("wandb")
    weights_only, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **kw: weights_only.append(kw["weights_only"]) or load(*a, **kw))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    copy = shutil.copytree(TINY / "pairs", tmp_path / "pairs")
    flags = {**FAST, "max_train_steps": 2, "dataset_name": copy, "offload": True, "report_to": "wandb"}
    flags |= {"validation_prompts": ["a red circle"], "num_validation_images": 1, "validation_inference_steps": 2}
    train(tmp_path / "out", resume_from_checkpoint=one_step, **flags)
    assert LORA_FILE in names_in(tmp_path / "out") and wandb.run is None
    assert len(weights_only) == 3 and all(weights_only)  # optimiser, schedule, random states
    run_id = json.loads((one_step / RECORD_FILE).read_text())["wandb_id"]
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert run.name.rpartition("-")[2] == run_id and list(run.glob("files/media/images/validation_*.png"))
    wait_for(lambda: b"implicit_accuracy" in log.read_bytes())  # wandb writes in a process of its own
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["wandb_id"] == run_id


def test_latest_is_the_newest_complete_checkpoint_or_the_start(tmp_path):
    out = tmp_path / "out"
    assert parse_args(train_flags(out, resume_from_checkpoint="latest")).resume_from_checkpoint is None
    for name in ("checkpoint-9", "checkpoint-10", "partial-checkpoint-11", "checkpoint-12-old", "checkpoint-last"):
        (out / name).mkdir(parents=True)
    args = parse_args(train_flags(out, resume_from_checkpoint="latest"))
    assert args.resume_from_checkpoint == str(out / "checkpoint-10")
    with pytest.raises(UserError, match="checkpoint-10 cannot be loaded.*training_args.json"):
        train(out, resume_from_checkpoint="latest", **FAST)


def test_a_folder_in_use_is_not_trodden_on(tmp_path):
    """Nor does an older checkpoint branch off in it: the newer ones would be taken for the latest, and the limit would
    delete what the branch saves."""
    older = tmp_path / "out" / "checkpoint-9"
    for path in (older, tmp_path / "out" / "checkpoint-10", tmp_path / "out" / "logs"):
        path.mkdir(parents=True)
    with pytest.raises(UserError, match="not empty, it holds checkpoint-10, checkpoint-9, logs: give --resume_from_"):
        parse_args(train_flags(tmp_path / "out"))
    with pytest.raises(UserError, match="checkpoint-9 is older than checkpoint-10 in --output_dir"):
        parse_args(train_flags(tmp_path / "out", resume_from_checkpoint=older))
    args = parse_args(train_flags(tmp_path / "other", resume_from_checkpoint=older))
    assert args.resume_from_checkpoint == str(older)


# Numbers gone wrong


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    """Neither weights nor optimiser nor schedule: a gradient that is not, and, as of an infinite error of the
    reference, a loss with a finite gradient. The data go on, and a run resumed after it goes on with the same."""
    seen, original = [], train_smpo_sd15.training_step

    def training_step(micro_batch, context):
        loss, metrics = original(micro_batch, context)
        seen.append(torch.cat([p.detach().flatten() for p in context.models["unet"].parameters() if p.requires_grad]))
        metrics["loss"] = metrics["loss"] * (math.inf if len(seen) == 5 else 1)
        return (loss * math.nan if len(seen) == 3 else loss), metrics

    monkeypatch.setattr(train_smpo_sd15, "training_step", training_step)
    flags = {**FAST, "report_to": "tensorboard", "lr_scheduler": "linear", "gradient_accumulation_steps": 2}
    flags |= {"max_train_steps": 3, "checkpointing_steps": 1}
    logs = train(tmp_path / "whole", **flags)
    assert logs["nonfinite_steps"] == [0, 2, 2] and np.isfinite(logs["grad_norm"]).all()
    np.testing.assert_allclose(logs["lr"], [1e-4, 2e-4 / 3, 1e-4 / 3], rtol=1e-6)  # the schedule waits; logged in fp32
    np.testing.assert_allclose(logs["epoch"], [2 / 369, 8 / 369, 10 / 369], rtol=1e-6)
    first, tried, again, after_them, last = seen[::2]
    assert not torch.equal(first, tried) and torch.equal(tried, again) and torch.equal(tried, after_them)
    assert not torch.equal(after_them, last)
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.bin")["state"]
    assert {float(weights["step"]) for weights in state.values()} == {3.0}

    train(tmp_path / "out", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2", **flags)
    assert same_weights(tmp_path / "whole" / LORA_FILE, tmp_path / "out" / LORA_FILE)


def test_too_little_memory_is_a_message_that_names_the_last_checkpoint(tmp_path, monkeypatch):
    original = train_smpo_sd15.training_step

    def training_step(micro_batch, context):
        if list(tmp_path.glob("out/checkpoint-1")):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(micro_batch, context)

    monkeypatch.setattr(train_smpo_sd15, "training_step", training_step)
    message = "CUDA out of memory.\n.*resume with --gradient_checkpointing.* The last checkpoint is .*checkpoint-1"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", **FAST, checkpointing_steps=1)


def test_numbers_that_stay_wrong_end_the_run_and_its_workers(tmp_path):
    """A learning rate that blows the weights up. The error stands alone, without a traceback, and names the last
    checkpoint. Workers do not hear the SIGTERM by which Python ends its children."""
    flags = {**FAST, "max_train_steps": 9, "checkpointing_steps": 1, "learning_rate": 1e30}
    flags["dataloader_num_workers"] = 2
    command = [sys.executable, str(ROOT / "train_smpo_sd15.py"), *train_flags(tmp_path / "out", **flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = "\ntrain_smpo_sd15.py: Loss or gradient was not finite 20 times after step 1. The last checkpoint is "
    assert f"{error}{tmp_path / 'out' / 'checkpoint-1'}. Start a run in another --output_dir" in done.stderr


# Bad data


def test_bad_pairs_give_way_and_are_counted(load, tmp_path, caplog, monkeypatch):
    """The next pair takes the place of one that cannot be read at either side, and the reason is logged."""
    labels = [0.9 - i / 100 for i in range(8)]
    columns = pd.read_parquet(TINY / "pairs" / "test.parquet", columns=["jpg_0", "jpg_1", "caption"])
    columns = columns[:8].to_dict("list")
    columns["jpg_0"][1] = columns["jpg_0"][1][:700]
    columns["jpg_1"][3] = b"<html>404</html>"
    columns["jpg_0"][5] = None
    columns["caption"][7] = None
    unreadable = "not a readable image"
    reasons = {1: unreadable, 3: unreadable, 5: unreadable, 7: "caption is NoneType, not a text"}
    flags = {**FAST, "dataset_name": write_pairs(tmp_path / "pairs.parquet", mine=labels, **columns)}
    flags |= {"label_column": "mine", "human_label_column": "none", "report_to": "tensorboard", "train_batch_size": 4}
    logs = train(tmp_path / "out", max_train_steps=2, **flags)  # an epoch
    assert logs["skipped_pairs"][-1] == 4 and np.isfinite(logs["loss"]).all()

    pairs, _ = load(**flags)
    message = "None of 1 pairs in a row of .*, row 3 of the"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(train_smpo_sd15, "MAX_BAD_IN_A_ROW", 1)
        pairs[0, 3]
    for row in range(8):
        example = pairs[0, row]
        assert example["soft_label_0"] == np.float32(labels[(row + (row in reasons)) % 8])
        assert len(example["problems"]) == (row in reasons)
        for problem in example["problems"]:
            assert f"row {row} of the data set: " in problem and reasons[row] in problem and problem in caplog.text


def test_too_many_bad_pairs_stop_the_run_and_keep_it(tmp_path):
    images = pd.read_parquet(TINY / "pairs" / "test.parquet", columns=["jpg_0"])["jpg_0"].tolist()
    path = write_pairs(tmp_path / "pairs.parquet", mine=[0.9] * 8, jpg_0=images[:5] + [b"x"] * 3)
    flags = {**FAST, "label_column": "mine", "human_label_column": "none", "dataset_name": path, "train_batch_size": 8}
    pattern = "12 of 28 pairs cannot be read, more than 10%, see above. .*checkpoint-2. Mend the images, not the rows"
    with pytest.raises(UserError, match=pattern):
        train(tmp_path / "out", max_train_steps=9, **flags)
    assert steps_in(tmp_path / "out") == [2]
    write_pairs(path, mine=[0.9] * 8)
    train(tmp_path / "out", max_train_steps=4, resume_from_checkpoint="latest", **flags)


# Trust


def test_only_safetensors_are_loaded_as_weights(tmp_path):
    base = shutil.copytree(TINY / "sd15", tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="--pretrained_model_name_or_path .*base cannot be loaded: .*safetensors"):
        train(tmp_path / "out", pretrained_model_name_or_path=base, **FAST)


@pytest.mark.parametrize("rank, public", [(2, True), (None, None)])
def test_no_secret_and_no_open_door_in_the_output(rank, public, tmp_path, monkeypatch):
    """A token is in no file, a local path in none that is uploaded, and nothing is for everyone to write, whatever the
    umask. The repository is private unless asked otherwise."""
    os.umask(0)
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    made, uploaded, repo = [], [], SimpleNamespace(repo_id="me/model")
    monkeypatch.setattr(train_smpo_sd15, "create_repo", lambda **options: made.append(options) or repo)
    monkeypatch.setattr(train_smpo_sd15, "upload_folder", lambda **options: uploaded.append(options))
    base, out = shutil.copytree(TINY / "sd15", tmp_path / "base"), tmp_path / "out"
    train(
        out, push_to_hub=True, hub_public=public, hub_model_id="me/model", pretrained_model_name_or_path=base,
        **{**FAST, "rank": rank, "report_to": "tensorboard", "max_train_steps": 1},
    )  # fmt: skip
    assert made == [{"repo_id": "me/model", "exist_ok": True, "private": not public}]
    assert uploaded[0]["repo_id"] == "me/model" and uploaded[0]["folder_path"] == str(out)
    for path in out.rglob("*"):
        assert not path.stat().st_mode & stat.S_IWOTH, path
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert RECORD_FILE in files and not [name for name, data in files.items() if b"hf_SECRET" in data]
    shown = set(filter_repo_objects(files, ignore_patterns=uploaded[0]["ignore_patterns"]))
    assert not [name for name in shown if str(tmp_path).encode() in files[name]]
    if rank:
        assert shown == {"README.md", LORA_FILE, KOHYA_LORA_FILE}
    else:
        assert {"README.md", "model_index.json", UNET_FILE} < shown and not [name for name in shown if "check" in name]


def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")  # which wants a Pillow below 13, so the suite's environment has none
    flags = {**FAST, "report_to": "trackio", "checkpointing_steps": 1}
    for steps in (1, 2):
        train(tmp_path / "out", max_train_steps=steps, resume_from_checkpoint="latest", **flags)
    with sqlite3.connect(tmp_path / "trackio" / "smpo-diffusion.db") as database:
        logged = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    (run_name,) = {name for name, *_ in logged}
    assert run_name == json.loads((tmp_path / "out" / RECORD_FILE).read_text())["wandb_id"]
    assert [step for _, step, text in logged if "implicit_accuracy" in str(text)] == [1, 2]


def test_an_upload_that_failed_is_done_by_the_same_command_again(tmp_path, monkeypatch):
    flags, uploaded = {**FAST, "max_train_steps": 1, "push_to_hub": True}, []
    with pytest.raises(UserError, match="(?s)out is complete, and cannot be uploaded: .*--resume_from_checkpoint la"):
        train(tmp_path / "out", **flags)  # there is no network
    trained, card = ((tmp_path / "out" / name).read_bytes() for name in (LORA_FILE, "README.md"))
    monkeypatch.setattr(train_smpo_sd15, "create_repo", lambda **options: SimpleNamespace(repo_id="me/out"))
    monkeypatch.setattr(train_smpo_sd15, "upload_folder", lambda **options: uploaded.append(options))
    train(tmp_path / "out", resume_from_checkpoint="latest", **flags)
    assert len(uploaded) == 1 and (tmp_path / "out" / LORA_FILE).read_bytes() == trained
    assert (tmp_path / "out" / "README.md").read_bytes() == card
