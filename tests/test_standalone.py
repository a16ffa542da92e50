"""Each script alone in an empty folder, in a process of its own: the whole road as a user walks it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, TWO_PROCESSES, command_line, names_in, read_logs, run_script, train, train_flags
from test_evaluate import evaluation_flags

import evaluate_smpo


# Two processes on the CPU, whatever this machine has; `accelerate launch --cpu` starts a single one.
LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


@pytest.fixture
def alone(tmp_path):
    """Copies a script into a folder that it has to itself."""

    def alone(script):
        folder = tmp_path / f"alone-{script}"
        folder.mkdir()
        return Path(shutil.copy(ROOT / script, folder))

    return alone


@pytest.fixture
def run_alone(alone, server):
    """Runs a copy of a script that is alone in its folder, and returns its output."""

    def run(script, args):
        assert server.run(args, module=str(alone(script))) == 0, server.output()
        return server.output()

    return run


def flags_of(tmp_path, model):
    flags = {"pretrained_model_name_or_path": model, "models": f"tuned={tmp_path / 'tuned'}"}
    return evaluation_flags(tmp_path / "evaluation", **flags)


def check_evaluation(tmp_path, printed):
    base, tuned = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert (base["model"], tuned["model"]) == ("base", "tuned") and base["mean"] != tuned["mean"]
    assert "| tuned |" in printed


def test_relabel_train_evaluate(tmp_path, run_alone, alone, server, monkeypatch):
    labels = tmp_path / "labels.parquet"
    flags = {"dataset_name": TINY / "pairs", "reward_model": TINY / "pickscore", "output_path": labels}
    run_alone("relabel_pickapic.py", command_line(**flags))

    flags = {"labels_path": labels, "rank": 4, "checkpointing_steps": 1, "beta_dpo": 200}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    script = alone("train_smpo_sd15.py")
    two_flags = train_flags(tmp_path / "tuned", train_batch_size=1, **flags)
    run_script(script, *two_flags, cwd=script.parent, launcher=LAUNCH)
    assert names_in(tmp_path / "tuned") == {
        "README.md", "checkpoint-1", "checkpoint-2", "logs", "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors", "training_args.json",
    }  # fmt: skip
    # Equal runs write equal files, in processes with another order of Python's sets too.
    two_flags = train_flags(tmp_path / "again", train_batch_size=1, **flags)
    assert server.run(two_flags, **TWO_PROCESSES) == 0, server.output()
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes(), name
    # Two processes with a pair each take the steps that one process takes with two.
    two, one = read_logs(tmp_path / "tuned"), train(tmp_path / "one", train_batch_size=2, **flags)
    for metric in ("loss", "grad_norm", "std_tau", "model_error_preferred", "weight", "lr", "epoch"):
        # fp32 keeps an error below 1 to some 1e-6, ten of its eps, of which beta gamma / 2 makes 1e-3.
        np.testing.assert_allclose(two[metric], one[metric], rtol=1e-3, err_msg=metric)
    check_evaluation(tmp_path, run_alone("evaluate_smpo.py", flags_of(tmp_path, TINY / "sd15")))


def test_sdxl_train_evaluate(tmp_path, run_alone, sdxl, capsys):
    flags = {"pretrained_model_name_or_path": sdxl, "label_column": "label_0", "rank": 4, "train_batch_size": 1}
    run_alone("train_smpo_sdxl.py", train_flags(tmp_path / "tuned", **flags))
    evaluate_smpo.main(evaluate_smpo.parse_args(flags_of(tmp_path, sdxl)))
    check_evaluation(tmp_path, capsys.readouterr().out)


WRONG = {  # a script's flags, and what is wrong with them
    "train_smpo_sd15.py": ("--dataset_name d --output_dir o --report_to none --lora_alpha 8", "--lora_alpha does"),
    "train_smpo_sdxl.py": ("--dataset_name d --output_dir o --report_to none --renoise_at last_move", "--renoise_at"),
    "relabel_pickapic.py": ("--dataset_name d --output_path labels.csv", "--output_path must end in .parquet"),
    "evaluate_smpo.py": ("--prompts_path p --output_dir o", "Give tuned models with --models"),
}


@pytest.mark.parametrize("script", WRONG)
def test_a_mistake_in_a_flag_is_told_alone_and_before_any_library_is_imported(script):
    flags, message = WRONG[script]
    model = [] if script.startswith("relabel") else ["--pretrained_model_name_or_path", "m"]
    command = [sys.executable, "-S", script, *flags.split(), *model]  # -S: without installed packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script}: {message}") and done.stderr.count("\n") == 1
