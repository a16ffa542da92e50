"""What the documents show works: command lines, configuration, snippets, flags, metrics and links are held against the
code."""

import doctest
import importlib
import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import rounds
import run_ablation
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, TINY, train, train_sdxl
from test_siblings import SCRIPTS, parser_of, script_parser

from diffusers import StableDiffusionXLPipeline


DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/against-the-paper.md", "docs/metrics.md",
    "tests/ablation/README.md", "tests/benchmarks/README.md",
]  # fmt: skip
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
README, ALL = TEXTS["README.md"], "".join(TEXTS.values())
BENCHMARKS = [path.stem for path in (ROOT / "tests/benchmarks").glob("benchmark_*.py")]
NAME = rf"({'|'.join(script.removesuffix('.py') for script in SCRIPTS)})\.py"


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def shell_lines(text):
    """Lines of the shell scripts in a document, continuation lines joined, and what it has between backticks."""
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub("```.*?```", "", text, flags=re.S))]
    return [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()] + inline


def command_lines(text=README):
    """Every line that launches one of the scripts."""
    return [line for line in shell_lines(text) if re.match(rf"accelerate launch .*{NAME} ", line)]


def other_lines():
    """Those of the scripts' docstrings, of the README's table of methods, and of the demo."""
    for script in SCRIPTS:
        text = importlib.import_module(script.removesuffix(".py")).__doc__.replace("\\\n", " ")
        yield from re.findall(r"^ +(accelerate launch .*)$", text, re.M)
    for flags in re.findall(r"^\| .* \| `(--.*)` \|$", README, re.M):
        for script in SCRIPTS[:2]:
            yield f'{script} --pretrained_model_name_or_path x --dataset_name "$PAIRS" --output_dir new {flags}'
    demo = ["make", "-n", "demo", "DEMO=tuned", f"TINY={TINY}", "-o", "install", "-o", ".venv/installed"]
    printed = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    for found in re.finditer(rf"{NAME} .*", printed):
        yield re.sub("(output_dir|output_path) tuned", r"\1 new", found[0])


def parse(line, folder):
    """What `accelerate launch` and the script make of a command line, in a folder that has the files it speaks of."""
    for name in ("anime.json", "concept-art.json", "paintings.json", "photo.json", "prompts.txt"):
        (folder / name).write_text('["a red circle"]')
    for name in ("smpo", "smpo-sd15", "smpo-sd15/checkpoint-50", "smpo-sdxl"):
        (folder / "tuned" / name / "unet").mkdir(parents=True)
        (folder / "tuned" / name / "unet" / "config.json").write_text("{}")
        (folder / "tuned" / name / "model_index.json").write_text("{}")
    if "relabel" not in line:
        (folder / "labels.parquet").touch()
        (folder / "tuned" / "labels.parquet").touch()
    line = re.sub("(smpo=|--run_dir )smpo-", r"\1tuned/smpo-", line).replace("PICKAPIC_V2", "$PAIRS")
    words = shlex.split(line.replace("$PAIRS", str(TINY / "pairs")).removesuffix("&"), comments=True)
    if words[0] != "accelerate":
        words = ["accelerate", "launch", *words]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    name = re.fullmatch(NAME, launch.training_script)[1]
    return launch, importlib.import_module(name).parse_args(launch.training_script_args)


@pytest.mark.parametrize("line", [*command_lines(), *other_lines()], ids=lambda line: re.search(NAME, line)[1])
def test_command_lines_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch, args = parse(line, tmp_path)
    assert getattr(args, "dataset_name", None) in (str(TINY / "pairs"), None)
    if "--max_train_steps 200" in line:  # the published recipe
        assert launch.num_processes == 8 or "PICKAPIC_V2" in line  # the docstrings say it in words
        assert 8 * args.train_batch_size * args.gradient_accumulation_steps == 1024
        sdxl = "sdxl" in launch.training_script
        assert (args.beta_dpo, args.optimizer) == ((5000, "adafactor") if sdxl else (2000, "adamw"))
        assert (args.gamma, args.num_inversion_steps, args.noising) == (10, 10 if sdxl else 5, "released")
        assert (args.lr_warmup_steps, args.proportion_empty_prompts) == (100, 0.2)


def test_every_script_is_shown():
    assert {re.search(NAME, line)[0] for line in command_lines()} == set(SCRIPTS)


def test_accelerate_takes_the_configuration(tmp_path):
    (block,) = blocks("yaml")
    path = tmp_path / "fsdp.yaml"
    path.write_text(block)
    launch = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    launch, config, _ = _validate_launch_command(launch)
    assert config.distributed_type.value == "FSDP" and launch.num_processes == yaml.safe_load(block)["num_processes"]
    assert launch.use_fsdp and launch.fsdp_version == 2 and launch.mixed_precision == "bf16"


@pytest.mark.parametrize("signalled", [True, False])
def test_the_slurm_script(signalled, tmp_path):
    """With stand-ins for what it calls: only a signal is passed on, the run's end awaited and the job requeued."""
    (script,) = (block for block in blocks("bash") if "#SBATCH" in block)
    stands_in = {
        "accelerate": "echo $$ > pid.tmp; mv pid.tmp pid; trap 'sleep 0.3; echo saved >> calls; exit 1' USR1\n"
        + "for i in $(seq 600); do sleep 0.05; [ -e finish ] && exit 0; done",
        "pkill": 'echo "$@" >> calls; kill -USR1 $(cat pid)',
        "scontrol": 'echo "$@" >> calls',
    }
    for name, body in stands_in.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PAIRS": "x", "SLURM_JOB_ID": "7"}
    job, calls = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment), tmp_path / "calls"
    while not (tmp_path / "pid").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1) if signalled else (tmp_path / "finish").touch()
    assert job.wait(20) == 0
    if not signalled:
        assert not calls.exists()
        return
    passed_on, *others = calls.read_text().splitlines()
    assert others == ["saved", "requeue 7"]
    for process, is_worker in {
        "/opt/venv/bin/python -u train_smpo_sd15.py --rank 4": True, "python3.11 train_smpo_sdxl.py": True,
        "python /opt/bin/accelerate launch train_smpo_sd15.py": False, "bash job.sh": False,
    }.items():  # fmt: skip
        assert bool(re.search(passed_on.removeprefix("-USR1 -f "), process)) == is_worker


def test_the_rounds(tmp_path):
    """The loop with a stand-in for accelerate: all that it calls parses, each round goes on with the last one's."""
    (script,) = (block for block in blocks("bash") if "for round in 1 2 3" in block)
    (tmp_path / "accelerate").write_text('#!/bin/bash\nprintf "%q " accelerate "$@" >> calls\necho >> calls\n')
    (tmp_path / "accelerate").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, check=True)
    calls = []
    for number, line in enumerate((tmp_path / "calls").read_text().splitlines()):
        (folder := tmp_path / str(number)).mkdir()
        calls.append(parse(line, folder)[1])
    drawn, trained = calls[::2], calls[1::2]
    models = [args.pretrained_model_name_or_path for args in drawn]
    assert models == [args.pretrained_model_name_or_path for args in trained]
    assert models[1:] == [args.output_dir for args in trained[:2]] and len(trained) == 3
    assert [args.pairs_path for args in drawn] == [args.dataset_name for args in trained]
    assert len({args.prompts_path[0] for args in drawn}) == 3


def test_loading_what_was_trained(sdxl, tmp_path, monkeypatch):
    """Both files of a LoRA, by the README's call; the LoRA changes what the UNet says."""
    monkeypatch.chdir(tmp_path)
    flags = {"rank": 2, "max_train_steps": 1, "train_batch_size": 2, "num_inversion_steps": 1, "learning_rate": 0.1}
    train_sdxl("my-lora", sdxl, label_column="label_0", gamma=1, **flags)
    (call,) = re.findall(r"`(pipeline\..*)`", README)
    for suffix in ("", "_kohya"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float16)
        eval(call.replace("weights.safetensors", f"weights{suffix}.safetensors"))
        unet = pipeline.unet
        assert unet.dtype == torch.float16 and unet.active_adapters() == ["default_0"]
        assert any(p.abs().max() > 0 for name, p in unet.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_in_docstrings(script):
    with torch.random.fork_rng():
        failed, attempted = doctest.testmod(importlib.import_module(script.removesuffix(".py")))
    assert not failed and attempted


def test_make_targets():
    """Those that the documents name are there; nothing is made."""
    for line in shell_lines(ALL):
        if line.startswith("make "):
            subprocess.run([*shlex.split(line, comments=True), "-n"], cwd=ROOT, capture_output=True, check=True)


def test_command_lines_of_benchmarks_and_ablation():
    found = set()
    for line in shell_lines(ALL):
        if called := re.match(r"python (tests/\w+/(\w+)\.py) ?(.*)", line):
            path, name, flags = called.groups()
            assert (ROOT / path).exists()
            found.add(name)
            if flags := shlex.split(flags, comments=True):
                module = importlib.import_module(name)
                parser_of(getattr(module, "parse_args", module.main)).parse_args(flags)
    assert found >= {*BENCHMARKS, "rounds", "run_ablation"}


def test_no_flag_is_spoken_of_that_is_not_there():
    known = {"--help", "--slow", "--logdir", "--shm-size"}  # of pytest, tensorboard and docker, too
    makers = [rounds.parse_args, run_ablation.parse_args]
    makers += [importlib.import_module(name).main for name in (*BENCHMARKS, "run_gpu")]
    for parser in (*map(script_parser, SCRIPTS), launch_command_parser(), *map(parser_of, makers)):
        known.update(parser._option_string_actions)
    text = re.sub(r"^#SBATCH.*$", "", ALL, flags=re.M)
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known


def explained(text, heading):
    """The metrics of a table's first column."""
    first_cells = [line.split("|")[1] for line in text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]]
    return [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_metric_is_explained(tmp_path):
    """What a run with everything switched on logs is what docs/metrics.md lists; CUDA adds its memory."""
    flags = {"label_column": "label_0", "rank": 2, "train_batch_size": 1, "max_train_steps": 1}
    logs = train(
        tmp_path, validation_prompts=["a red circle"], validation_inference_steps=2, num_validation_images=1,
        validation_split="test", num_inversion_steps=1, **flags,
    )  # fmt: skip
    all_of_them = explained(TEXTS["docs/metrics.md"], "| metric | formula")
    assert sorted(all_of_them) == sorted([*logs, "peak_memory_gib", "reserved_memory_gib"])
    assert set(explained(README, "| metric | what")) < set(all_of_them)


def test_evidence():
    """Every interval that the README quotes stands in the ablation's tables, which are those of its CSVs."""
    quoted, tables = re.findall(r"[+-][\d.]+ ± [\d.]+", README), TEXTS["tests/ablation/README.md"]
    assert len(quoted) == 14 and all(interval in tables for interval in quoted)
    titles = {
        "forward noise": "forward (Diffusion-DPO)", "DDIM inversion": "DDIM, 9 moves",
        "+ ReNoise at the last move, as the paper has it": "ReNoise, last of 9 moves",
        "+ ReNoise at every move": "ReNoise, every one of 5 moves",
        "half random, half the paper's noise": "half random, half last of 9",
        "released code, 5 levels (the default)": "released code, 5 levels",
    }  # fmt: skip
    (table,) = re.findall(r"^\| row \| reward gain .*\n\|[-|]*\n((?:\|.*\n)*)", README, re.M)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [title for title, *_ in rows] == list(titles)
    for title, gain, calls, seeds in rows:
        whole = rf"^\| {re.escape(titles[title])}, soft \| 5e-05 \| 8 \| {calls} \| {re.escape(gain)} \|.* {seeds} \|$"
        assert re.search(whole, tables, re.M), title


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths(name):
    path = ROOT / name
    text = path.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text()), target
    for inner in re.findall(r"`((?:docs|tests|\.ci|\.github)/[\w./-]*)", text):
        assert (ROOT / inner).exists(), inner
