"""What the README shows works: command lines, configurations, snippets, flags, metrics and links are held against the code."""

import importlib
import math
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import benchmark_flops
import pyarrow.parquet as pq
import pytest
import run_ablation
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, TINY, relabel, train, train_sdxl
from PIL import Image
from readme_flags import BLOCK, parser_of, script_parser, with_tables
from test_siblings import SCRIPTS


README = (ROOT / "README.md").read_text()
PROSE = re.sub(BLOCK, "", README, flags=re.S)  # without the tables of flags
NAME = rf"({'|'.join(script.removesuffix('.py') for script in SCRIPTS)})\.py"
EIGHT_GPUS = "--num_processes 8 --mixed_precision fp16"


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def lines_of(block):
    """Lines of a shell script, continuation lines joined."""
    return block.replace("\\\n", " ").splitlines()


def command_lines(text=README):
    """Every line that runs one of the scripts."""
    return [line for block in blocks("bash", text) for line in lines_of(block) if re.search(NAME, line)]


def docstring_lines():
    """The same, of the scripts' own docstrings."""
    for script in SCRIPTS:
        text = importlib.import_module(script.removesuffix(".py")).__doc__
        yield from re.findall(r"^ +(accelerate launch .*)$", text, re.M)


def parse(line, folder):
    """What `accelerate launch` and the script make of a command line, in a folder that has the files it speaks of."""
    for name in ("anime.json", "concept-art.json", "paintings.json", "photo.json", "prompts.txt"):
        (folder / name).write_text('["a red circle"]')
    for name in ("smpo-sd15", "smpo-sdxl"):
        (folder / "tuned" / name / "unet").mkdir(parents=True)
        (folder / "tuned" / name / "unet" / "config.json").write_text("{}")
        (folder / "tuned" / name / "model_index.json").write_text("{}")
    if "--labels_path" in line:
        (folder / "labels.parquet").touch()
    (folder / "engine.yaml").write_text(next(block for block in blocks("yaml") if "FSDP" in block))
    line = line.replace("smpo=smpo-", "smpo=tuned/smpo-").replace("PICKAPIC_V2", "$PAIRS")
    words = shlex.split(line.replace("$PAIRS", str(TINY / "pairs")).removesuffix("&"), comments=True)
    assert words[:2] == ["accelerate", "launch"]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    name = re.fullmatch(NAME, launch.training_script)[1]
    return launch, importlib.import_module(name).parse_args(launch.training_script_args)


@pytest.mark.parametrize("line", [*command_lines(), *docstring_lines()], ids=lambda line: re.search(NAME, line)[1])
def test_command_lines_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch, args = parse(line, tmp_path)
    assert args.dataset_name == str(TINY / "pairs") or args.prompts_path
    if "--max_train_steps 200" in line:  # the published recipe
        assert launch.num_processes == 8 or "PICKAPIC_V2" in line  # the docstrings say it in words
        pairs = 8 * args.train_batch_size * args.gradient_accumulation_steps
        assert pairs == 1024 and args.learning_rate * pairs == pytest.approx(1.024e-5) and args.scale_lr
        sdxl = "sdxl" in launch.training_script
        assert (args.beta_dpo, args.optimizer) == ((5000, "adafactor") if sdxl else (2000, "adamw"))
        assert (args.gamma, args.num_inversion_steps, args.noising) == (10, 9, "renoise")
        assert (args.inversion_guidance_scale, args.lr_warmup_steps, args.proportion_empty_prompts) == (1, 100, 0.2)


def test_every_script_is_shown():
    assert {re.search(NAME, line)[0] for line in command_lines()} == set(SCRIPTS)
    assert [EIGHT_GPUS in line for line in command_lines() if "--max_train_steps 200" in line].count(True) == 2


def test_the_table_of_machines():
    """Each row's launcher parses, and its accumulation makes 1024 pairs a step."""
    rows = re.findall(r"^\| (\d) GPUs? \| `accelerate launch ([^`]+)` \| (\d+) \|$", README, re.M)
    assert [int(gpus) for gpus, _, _ in rows] == [1, 2, 8]
    for gpus, flags, accumulation in rows:
        launch = launch_command_parser().parse_args([*flags.split(), "script.py"])
        assert launch.num_processes == int(gpus) and int(gpus) * int(accumulation) == 1024


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.split("\n")[0].strip("# ")[:20])
def test_accelerate_takes_the_configurations(block, tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text(block)
    launch = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    launch, config, _ = _validate_launch_command(launch)
    kind, written = config.distributed_type.value, yaml.safe_load(block)
    assert kind == written["distributed_type"] and launch.num_processes == written["num_processes"]
    assert (launch.multi_gpu, launch.use_fsdp, launch.use_deepspeed) == tuple(
        kind == other for other in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    assert launch.mixed_precision == "bf16" and not kind == "FSDP" or launch.fsdp_version == 2
    assert kind != "DEEPSPEED" or launch.zero_stage == 2


def test_configurations_for_every_case():
    kinds = [yaml.safe_load(block) for block in blocks("yaml")]
    assert [(kind["distributed_type"], kind["num_processes"]) for kind in kinds] == [
        ("NO", 1), ("MULTI_GPU", 2), ("MULTI_GPU", 8), ("FSDP", 8), ("DEEPSPEED", 8)
    ]  # fmt: skip


@pytest.mark.parametrize("signalled", [True, False])
def test_the_slurm_script(signalled, tmp_path):
    """With stand-ins for what it calls: a signal is passed on, the run's end awaited and the job requeued; else it is not."""
    (script,) = (block for block in blocks("bash") if "#SBATCH" in block)
    (tmp_path / "job.sh").write_text(script)
    stands_in = {
        "accelerate": "echo $$ > pid.tmp; mv pid.tmp pid; trap 'sleep 0.3; echo saved >> calls; exit 1' USR1\n"
        + "for i in $(seq 600); do sleep 0.05; [ -e finish ] && exit 0; done",
        "pkill": 'echo "pkill $@" >> calls; kill -USR1 $(cat pid)',
        "scontrol": 'echo "scontrol $@" >> calls',
    }
    for name, body in stands_in.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env={**os.environ, "PATH": path, "PAIRS": "x", "SLURM_JOB_ID": "7"}
    )
    while not (tmp_path / "pid").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1) if signalled else (tmp_path / "finish").touch()
    assert job.wait(20) == 0
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert [call.split()[0] for call in calls] == (["pkill", "saved", "scontrol"] if signalled else [])
    if signalled:
        assert calls[2] == "scontrol requeue 7"
        pattern = calls[0].removeprefix("pkill -USR1 -f ")
        for worker in ("/opt/venv/bin/python -u train_smpo_sd15.py --rank 4", "python3.11 train_smpo_sdxl.py"):
            assert re.search(pattern, worker)
        for other in ("python /opt/bin/accelerate launch train_smpo_sd15.py", "bash job.sh"):
            assert not re.search(pattern, other)


def test_own_pairs(tmp_path, monkeypatch):
    """The snippet's file is labelled and trained on by the scripts as they are."""
    monkeypatch.chdir(tmp_path)
    for color, name in (("red", "left.jpg"), ("green", "right.jpg"), ("blue", "other.png")):
        Image.new("RGB", (80, 64), color).save(name)
    (snippet,) = (block for block in blocks("python") if "pq.write_table" in block)
    exec(snippet, {})
    relabel(dataset_name="my_pairs.parquet", output_path="labels.parquet")
    labels = pq.read_table("labels.parquet")
    assert labels["valid"].to_pylist() == [True, True]
    assert labels["image_0_uid"][0] == labels["image_0_uid"][1] != labels["image_1_uid"][1]
    flags = {"rank": 2, "max_train_steps": 1, "train_batch_size": 2, "num_inversion_steps": 1, "gamma": 1}
    for labels in ({"labels_path": "labels.parquet"}, {"labels_path": None, "label_column": "label_0"}):
        logs = train("-".join(labels), dataset_name="my_pairs.parquet", **labels, **flags)
        assert logs["skipped_pairs"] == [0] and logs["loss"][0] == pytest.approx(math.log(2))


def test_loading_what_was_trained(sdxl, tmp_path, monkeypatch):
    """A pipeline, and a LoRA with what ComfyUI reads, by the snippets; the LoRA changes what the UNet says."""
    monkeypatch.chdir(tmp_path)
    Path("smpo-sd15").symlink_to(TINY / "sd15")
    Path("stabilityai").mkdir()
    Path("stabilityai/stable-diffusion-xl-base-1.0").symlink_to(sdxl)
    flags = {"rank": 2, "max_train_steps": 1, "train_batch_size": 2, "num_inversion_steps": 1, "learning_rate": 0.1}
    train_sdxl("my-lora", sdxl, label_column="label_0", gamma=1, output_kohya_format=True, **flags)
    assert Path("my-lora/pytorch_lora_weights_kohya.safetensors").is_file()
    lora, whole = (block for block in blocks("python") if "from_pretrained" in block)
    names = {}
    exec(whole, names)
    assert names["pipeline"].unet.config.sample_size == 8
    exec(lora, names)
    unet = names["pipeline"].unet
    assert unet.dtype == torch.float16 and unet.active_adapters() == ["default_0"]
    assert any(p.abs().max() > 0 for name, p in unet.named_parameters() if "lora_B" in name)


def test_make_targets(tmp_path):
    """Those of the README and of CONTRIBUTING.md are there, with the variables that are set; nothing is made."""
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    lines = [line for block in blocks("bash", text) for line in lines_of(block) if line.startswith("make ")]
    lines += [re.sub(r"\s+", " ", line) for line in re.findall(r"`(make\s[^`]+)`", text)]
    makefile = (ROOT / "Makefile").read_text()
    assert {shlex.split(line)[1] for line in lines} >= {
        "demo",
        "test",
        "test-slow",
        "upstream",
        "fix-copies",
        "quality",
    }
    for line in lines:
        words = shlex.split(line, comments=True)
        done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for word in words[2:]:
            assert f"$({word.split('=')[0]})" in makefile, line


def test_benchmarks(tmp_path):
    """Their command lines parse."""
    lines = re.findall(r"`[^`]*?(benchmark_\w+)\.py\s?([^`]*)`", PROSE)
    assert {name for name, _ in lines} == {path.stem for path in (ROOT / "tests/benchmarks").glob("benchmark_*.py")}
    for name, flags in lines:
        flags = re.sub(r" and so on", "", flags)
        if flags:
            parser_of(importlib.import_module(name).main).parse_args(shlex.split(flags))


def test_arithmetic(capsys):
    benchmark_flops.main([])
    printed = capsys.readouterr().out
    table = printed[printed.index("| 204,800 pairs") :]
    assert table in README and table.count("\n") == 12


def test_flags():
    """Every flag is in its table as the parser has it, and no other flag is spoken of anywhere."""
    assert with_tables(README) == README, "run `make fix-copies`"
    listed = [script for scripts, _ in re.findall(BLOCK, README, re.S) for script in scripts.split(", ")]
    assert sorted(listed) == sorted(SCRIPTS)
    known = {
        "--help",
        "--repo-type",
        "--local-dir",
        "--logdir",
        "--shm-size",
    }  # of `hf download`, tensorboard and docker, too
    for parser in (
        *map(script_parser, SCRIPTS), launch_command_parser(), parser_of(benchmark_flops.main),
        *(parser_of(importlib.import_module(f"benchmark_{name}").main) for name in ("relabel", "training")),
        parser_of(run_ablation.parse_args),
    ):  # fmt: skip
        known.update(parser._option_string_actions)
    text = re.sub(r"^#SBATCH.*$", "", PROSE, flags=re.M) + (ROOT / "CONTRIBUTING.md").read_text()
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known - {"--slow"}


def test_every_metric_is_explained(tmp_path):
    """What a run with everything switched on logs is what the table lists; CUDA adds its memory."""
    flags = {
        "label_column": "label_0",
        "rank": 2,
        "train_batch_size": 1,
        "max_train_steps": 1,
        "num_inversion_steps": 1,
    }
    logs = train(
        tmp_path, validation_prompts=["a red circle"], validation_reward_model=TINY / "pickscore",
        validation_inference_steps=2, num_validation_images=1, validation_split="test", max_validation_samples=1, **flags,
    )  # fmt: skip
    table = README[README.index("| metric | formula") :].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    explained = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(explained) == len(set(explained)) and set(explained) == {*logs, "peak_memory_gib"}


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_paths(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors(text), target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tests|\.ci|\.github)/[\w./-]*)", text):
        assert (ROOT / path).exists(), path
    for line in "".join(blocks(r"\w+", text)).splitlines():
        assert len(line) <= 104, line  # what fits without scrolling
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>")


def test_sections_and_citations():
    titles = [line for line in README.splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles)) and {
        "## Speed",
        "## Does the method work?",
        "## A LoRA on your own pairs",
    } <= set(titles)
    cited = set(re.findall(r"arXiv:(\d+\.\d+)", "".join(blocks("bibtex"))))
    assert cited == {"2506.02698", "2311.12908", "2305.01569", "2403.14602", "2503.18454"}
    numbered = re.findall(r"^ ?(\d+)\. ", README[README.index("## Where this parts") :].split("\n## ")[0], re.M)
    assert [int(number) for number in numbered] == list(range(1, len(numbered) + 1)) and len(numbered) > 8
