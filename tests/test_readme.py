"""What the README shows works: its command lines parse, and accelerate reads its configurations."""

import importlib
import re
import shlex

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from conftest import ROOT, TINY


README = (ROOT / "README.md").read_text()
SCRIPTS = r"(relabel_pickapic|train_smpo_sd15|train_smpo_sdxl|evaluate_smpo)\.py"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def command_lines():
    """Every line of the README that runs one of the scripts, continuation lines joined."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(SCRIPTS, line)]


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: re.search(SCRIPTS, line).group(1))
def test_command_lines_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text('["a red circle"]')
    if "--labels_path" in line:
        (tmp_path / "labels.parquet").touch()
    for name in ("smpo-sd15", "smpo-sdxl"):
        (tmp_path / "tuned" / name).mkdir(parents=True)
        (tmp_path / "tuned" / name / "model_index.json").write_text("{}")
    line = line.replace("smpo=smpo-", "smpo=tuned/smpo-").replace("$PAIRS", str(TINY / "pairs"))
    name, *_ = re.search(SCRIPTS, line).groups()
    module = importlib.import_module(name)
    args = module.parse_args(shlex.split(line.split(f"{name}.py")[1], comments=True))
    assert args.dataset_name == str(TINY / "pairs") or len(args.prompts_path) == 4


def test_every_script_is_shown():
    shown = {re.search(SCRIPTS, line).group(1) for line in command_lines()}
    assert shown == {"relabel_pickapic", "train_smpo_sd15", "train_smpo_sdxl", "evaluate_smpo"}


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: yaml.safe_load(block)["distributed_type"])
def test_accelerate_reads_the_configurations(block, tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text(block)
    config = ClusterConfig.from_yaml_file(path)
    assert config.num_processes == 8 and config.distributed_type in ("FSDP", "DEEPSPEED")


def test_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()
