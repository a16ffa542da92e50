"""What strangers find around the scripts: the workflow, versions, licence headers, and files in their place."""

import ast
import re
import subprocess

import pytest
import yaml
from conftest import ROOT


TOP_LEVEL = {
    ".ci", ".github", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "docs",
    "evaluate_smpo.py", "pyproject.toml", "relabel_pickapic.py", "requirements.txt", "tests", "train_smpo_sd15.py",
    "train_smpo_sdxl.py",
}  # fmt: skip
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def requirements(name):
    """`[(package, operator and version, marker)]` of a file of requirements."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [re.fullmatch(r"([\w-]+)([<>=]=[\d.]+)?(?:; (.*))?", line).groups() for line in lines if line]


def test_files_at_the_top():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no clone")
    assert {path.split("/")[0] for path in done.stdout.splitlines()} == TOP_LEVEL


def test_the_workflow_runs_what_everyone_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as true
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (.*)$", script, re.M) == ["quality", "test"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_oldest_python():
    """The sources have Python 3.10's grammar, and ruff is told so."""
    assert 'target-version = "py310"' in (ROOT / "pyproject.toml").read_text()
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        ast.parse(path.read_text(), feature_version=(3, 10))
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass\n", feature_version=(3, 10))


def test_constraints_pin_what_is_required():
    """Each requirement has one version on Python 3.10 and one on later ones, at or above its lower bound."""
    pinned = requirements("tests/constraints.txt")
    for marker in ('python_version < "3.11"', 'python_version >= "3.11"'):
        versions = {name: version for name, version, when in pinned if when in (None, marker)}
        assert len(versions) == sum(when in (None, marker) for _, _, when in pinned)
        for name, bound, _ in requirements("requirements.txt") + requirements("tests/requirements.txt"):
            least, pin = (tuple(map(int, (text or "==0")[2:].split("."))) for text in (bound, versions[name]))
            assert pin >= least, name
    assert {when for _, _, when in pinned} == {None, 'python_version < "3.11"', 'python_version >= "3.11"'}


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.py"), *(ROOT / "tests" / "benchmarks").glob("*.py")], ids=lambda p: p.name
)
def test_licence_header(path):
    assert "Licensed under the Apache License, Version 2.0" in path.read_text()[:600]
