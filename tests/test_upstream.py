"""`make upstream` copies a folder that passes the rules of the diffusers repository on its own."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from test_readme import blocks, command_lines
from test_siblings import SCRIPTS, TRAINING, script_parser


# Of the arguments that the newest SD and SDXL training examples share, those that have a meaning here.
ARGUMENTS = """
    pretrained_model_name_or_path revision variant dataset_name caption_column output_dir
    seed resolution train_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing
    learning_rate lr_scheduler lr_warmup_steps use_8bit_adam allow_tf32 dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_model_id report_to mixed_precision
    pretrained_vae_model_name_or_path proportion_empty_prompts rank lora_alpha lora_layers offload optimizer
    beta_dpo dataset_split_name validation_steps validation_prompts num_validation_images max_train_samples
    no_hflip
""".split()
# Packages that requirements.txt brings without naming them, and those that a flag asks for.
BROUGHT = {"huggingface_hub", "fsspec", "filelock", "jinja2", "pandas", "numpy", "safetensors", "tqdm"}
OPTIONAL = {"wandb", "trackio", "bitsandbytes"}
TESTS = "test_smpo_diffusion.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    destination = tmp_path_factory.mktemp("research_projects")
    subprocess.run(["make", "upstream", f"DEST={destination}"], cwd=ROOT, check=True, capture_output=True)
    return destination / "smpo_diffusion"


def imports(tree):
    """(top-level name, node) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").split(".")[0], node


def bounds(text):
    """`{package: version bound}` of requirements."""
    return dict(re.findall(r"^([\w-]+)([<>=.\d]*)", text, re.M))


def test_exactly_what_is_needed(folder):
    assert {path.name for path in folder.rglob("*")} == {*SCRIPTS, "README.md", "requirements.txt", TESTS}
    for name in (*SCRIPTS, "requirements.txt"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_destination_has_to_be_given():
    done = subprocess.run(["make", "upstream", "DEST="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Give DEST=" in done.stdout


@pytest.mark.parametrize("name", [*SCRIPTS, TESTS])
def test_header(folder, name):
    lines = (folder / name).read_text().splitlines()
    if name in SCRIPTS:
        assert lines.pop(0) == "#!/usr/bin/env python"
    assert lines[0] == "# coding=utf-8" and re.match(r"# Copyright 20\d\d .*\. All rights reserved\.$", lines[1])
    assert lines[3] == '# Licensed under the Apache License, Version 2.0 (the "License");'
    assert lines[13] == "# limitations under the License."


@pytest.mark.parametrize("name", SCRIPTS)
def test_dependencies(folder, name):
    """The PEP 723 block names what the script imports, with the bounds of requirements.txt; whatever a flag asks for
    is imported when it does, and nothing else but the standard library."""
    source, required = (folder / name).read_text(), bounds((folder / "requirements.txt").read_text())
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.M)
    named = {package: bound for line in re.findall(r'"([^"]+)"', block) for package, bound in bounds(line).items()}
    assert named and all(bound in ("", required[package]) for package, bound in named.items())
    modules = packages_distributions()
    for module, node in imports(ast.parse(source)):
        packages = {package.lower() for package in modules.get(module, [])}
        if module in OPTIONAL:
            assert node.col_offset > 0, module
        elif module not in sys.stdlib_module_names | BROUGHT:
            assert packages & named.keys(), module


@pytest.mark.parametrize("name", SCRIPTS)
def test_habits(folder, name):
    source = (folder / name).read_text()
    tree = ast.parse(source)
    if any(module == "diffusers" for module, _ in imports(tree)):
        (bound,) = re.findall(r'^check_min_version\("([\d.]+)"\)$', source, re.M)
        assert f"diffusers>={bound}\n" in (folder / "requirements.txt").read_text()
        readme = (folder / "README.md").read_text().replace("\n> ", " ")
        assert f"diffusers {bound.removesuffix('.0')} and later" in readme
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.unparse(functions["parse_args"]) == "input_args=None" and ast.unparse(functions["main"]) == "args"
    assert source.endswith('\nif __name__ == "__main__":\n    with short_errors():\n        main(ARGS)\n')
    assert "logger = get_logger(__name__)" in source or name == "evaluate_smpo.py"
    assert not re.search(r"\btests/|\bmake [a-z-]+`|CONTRIBUTING", source)  # what is not in this folder


def test_argument_names_and_help():
    parsers = {script: script_parser(script) for script in SCRIPTS}
    assert all("--caption_column" in parser.format_help() for parser in parsers.values())
    assert not set(ARGUMENTS) - {action.dest for script in TRAINING for action in parsers[script]._actions}


def test_readme(folder):
    text = (folder / "README.md").read_text()
    assert "not maintained by the diffusers team" in text and re.search(r"tag @\w+", text)
    assert "https://arxiv.org/abs/2506.02698" in text and "accelerate launch" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    for name in re.findall(r"`?\b([\w-]+\.(?:py|txt))\b", text):
        assert (folder / name).is_file() or name == "prompts.txt", name  # the reader's own
    ours = (ROOT / "README.md").read_text()
    assert [block for block in blocks("bash", text) if block not in ours] == []  # of which lines are parsed
    assert {re.search(r"(\w+\.py)", line)[1] for line in command_lines(text)} == set(SCRIPTS)
    known = {name for script in SCRIPTS for name in script_parser(script)._option_string_actions}
    launcher = {"--num_processes"}
    assert not set(re.findall(r"(?<![\w-])--[a-z]\w*", text)) - known - launcher


@pytest.mark.slow
def test_its_own_tests(folder, tmp_path, monkeypatch):
    """Each script under `accelerate launch` on models that the tests make, some minutes on two cores."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # the environment's accelerate
    output = run_script("-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", tmp_path, folder / TESTS, cwd=folder)
    assert re.search(r"^3 passed", output, re.M)
