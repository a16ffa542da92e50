"""What strangers find around the scripts: files in their place, an old Python's grammar, licence headers, versions."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT


TOP_LEVEL = {
    ".ci", ".github", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "docs",
    "evaluate_smpo.py", "pyproject.toml", "relabel_pickapic.py", "requirements.txt", "tests", "train_smpo_sd15.py",
    "train_smpo_sdxl.py",
}  # fmt: skip


def requirements(name):
    """`[(package, operator and version, marker)]` of a file of requirements."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [re.fullmatch(r"([\w-]+)([<>=]=[\d.]+)?(?:; (.*))?", line).groups() for line in lines if line]


def test_files_at_the_top():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no clone")
    assert {path.split("/")[0] for path in done.stdout.splitlines()} == TOP_LEVEL


def test_sources_have_the_grammar_of_python_3_10_short_lines_and_those_that_travel_a_licence():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        ast.parse(path.read_text(), feature_version=(3, 10))
        assert max(map(len, [*path.read_text().splitlines(), ""])) <= 119, path
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests" / "benchmarks").glob("*.py")]:
        assert "Licensed under the Apache License, Version 2.0" in path.read_text()[:600], path


def test_constraints_pin_what_is_required():
    """Each requirement has one version on Python 3.10 and one on later ones, at or above its lower bound."""
    pinned = requirements("tests/constraints.txt")
    for marker in ('python_version < "3.11"', 'python_version >= "3.11"'):
        versions = {name: version for name, version, when in pinned if when in (None, marker)}
        assert len(versions) == sum(when in (None, marker) for _, _, when in pinned)
        for name, bound, _ in requirements("requirements.txt") + requirements("tests/requirements.txt"):
            least, pin = (tuple(map(int, (text or "==0")[2:].split("."))) for text in (bound, versions[name]))
            assert pin >= least, name
