"""Each script alone in an empty folder: the whole road as a user walks it."""

import json
import shutil

import numpy as np
from conftest import ROOT, TINY, command_line, names_in, read_logs, run_script, train, train_flags


# Two processes on the CPU, whatever this machine has; `accelerate launch --cpu` starts a single one.
LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


def test_relabel_train_evaluate(tmp_path, monkeypatch):
    folders = {}
    for script in ("relabel_pickapic.py", "train_smpo_sd15.py", "evaluate_smpo.py"):
        folders[script] = tmp_path / script.removesuffix(".py")
        folders[script].mkdir()
        shutil.copy(ROOT / script, folders[script])
    labels = tmp_path / "labels.parquet"
    flags = {"dataset_name": TINY / "pairs", "reward_model": TINY / "pickscore", "output_path": labels}
    run_script("relabel_pickapic.py", *command_line(**flags), cwd=folders["relabel_pickapic.py"])

    flags = {"labels_path": labels, "rank": 4, "checkpointing_steps": 1, "beta_dpo": 200}
    launched = train_flags(tmp_path / "tuned", train_batch_size=1, **flags)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_script("train_smpo_sd15.py", *launched, cwd=folders["train_smpo_sd15.py"], launcher=LAUNCH)
    assert names_in(tmp_path / "tuned") == {
        "README.md", "checkpoint-1", "checkpoint-2", "logs", "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors", "training_args.json",
    }  # fmt: skip
    # Two processes with a pair each take the steps that one process takes with two.
    two, one = read_logs(tmp_path / "tuned"), train(tmp_path / "one", train_batch_size=2, **flags)
    for metric in ("loss", "grad_norm", "std_tau", "model_error_preferred", "weight", "lr", "epoch"):
        # fp32 keeps an error below 1 to some 1e-6, ten of its eps, of which beta gamma / 2 makes 1e-3.
        np.testing.assert_allclose(two[metric], one[metric], rtol=1e-3, err_msg=metric)

    flags = {
        "pretrained_model_name_or_path": TINY / "sd15", "models": f"tuned={tmp_path / 'tuned'}",
        "dataset_name": TINY / "pairs", "split": "test", "reward_model": TINY / "pickscore", "max_prompts": 4,
        "num_inference_steps": 2, "resolution": 64, "output_dir": tmp_path / "evaluation",
    }  # fmt: skip
    printed = run_script("evaluate_smpo.py", *command_line(**flags), cwd=folders["evaluate_smpo.py"])
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert [row["model"] for row in results] == ["base", "tuned"]
    assert "| tuned |" in printed


def test_sdxl_train_evaluate(tmp_path, sdxl):
    for script in ("train_smpo_sdxl.py", "evaluate_smpo.py"):
        shutil.copy(ROOT / script, tmp_path)
    flags = train_flags(
        tmp_path / "tuned", pretrained_model_name_or_path=sdxl, label_column="label_0", rank=4, train_batch_size=1
    )
    run_script("-I", "train_smpo_sdxl.py", *flags, cwd=tmp_path)
    flags = {
        "pretrained_model_name_or_path": sdxl, "models": f"tuned={tmp_path / 'tuned'}", "resolution": 64,
        "dataset_name": TINY / "pairs", "split": "test", "reward_model": TINY / "pickscore", "max_prompts": 2,
        "num_inference_steps": 2, "output_dir": tmp_path / "evaluation",
    }  # fmt: skip
    run_script("-I", "evaluate_smpo.py", *command_line(**flags), cwd=tmp_path)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert [row["model"] for row in results] == ["base", "tuned"] and results[0]["mean"] != results[1]["mean"]
