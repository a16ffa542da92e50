"""What two scripts share stands in both, to the letter.

Each script runs when copied alone, so there is no module to share. Any function, class or constant at the top level of
two scripts must be identical, and a flag of two scripts must have the same type, choices, help and default, unless a table
here says why not. `python tests/test_siblings.py` (`make fix-copies`) copies the shared functions and classes of the
script that stands first in `SCRIPTS` into the others.
"""

import argparse
import ast
import importlib
import itertools
from pathlib import Path
from unittest import mock

import pytest


ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_smpo_sd15.py", "relabel_pickapic.py", "evaluate_smpo.py"]

# name: why the scripts that have it may differ
DIFFERENT_NAMES = {
    "parse_args": "each script has flags of its own",
    "validate_args": "each script has flags of its own",
    "main": "each script does something else",
    "logger": "only training runs in several processes, of which one is to speak",
}
# (flag, property): why
DIFFERENT_FLAGS = {
    ("seed", "help"): "seeds a training run in one and images in the other",
    ("dataset_name", "required"): "prompts may come from a text file",
    ("output_dir", "help"): "the scripts write different things",
    ("batch_size", "help"): "images to score in one, images to draw in the other",
    ("batch_size", "default"): "drawing an image takes more memory than scoring it",
}


def definitions(script):
    """`{name: source}` of what stands at the top level, decorators included."""
    source = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            names, lines = [node.name], (start, node.end_lineno)
        elif isinstance(node, ast.Assign):
            names, lines = [target.id for target in node.targets], (node.lineno, node.end_lineno)
        else:
            continue
        for name in names:
            found[name] = "\n".join(source.splitlines()[lines[0] - 1 : lines[1]])
    return found


def shared_names():
    for first, second in itertools.combinations(SCRIPTS, 2):
        for name in sorted(definitions(first).keys() & definitions(second).keys()):
            yield first, second, name


def flags(script):
    """`{flag: its properties}` of a script's parser."""
    module = importlib.import_module(script.removesuffix(".py"))
    parser = None

    def remember(self, args=None, namespace=None):
        nonlocal parser
        parser = self
        raise SystemExit

    with mock.patch.object(argparse.ArgumentParser, "parse_args", remember), pytest.raises(SystemExit):
        module.parse_args([])
    return {
        action.dest: {
            "type": action.type, "choices": action.choices, "help": action.help, "default": action.default,
            "nargs": action.nargs, "required": action.required, "names": action.option_strings,
        }
        for action in parser._actions
    }  # fmt: skip


@pytest.mark.parametrize("first, second, name", [case for case in shared_names() if case[2] not in DIFFERENT_NAMES])
def test_shared_names_are_identical(first, second, name):
    assert definitions(first)[name] == definitions(second)[name], f"run `make fix-copies`: {name}, {first}, {second}"


def test_shared_flags_are_identical():
    problems, used = [], set()
    of_script = {script: flags(script) for script in SCRIPTS}
    for first, second in itertools.combinations(SCRIPTS, 2):
        for flag in of_script[first].keys() & of_script[second].keys():
            for key, value in of_script[first][flag].items():
                if value != of_script[second][flag][key]:
                    used.add((flag, key))
                    if (flag, key) not in DIFFERENT_FLAGS:
                        problems.append(f"--{flag}: {key} differs between {first} and {second}")
    assert not problems
    assert used == set(DIFFERENT_FLAGS), "stale exemptions"


def test_no_exemption_is_stale():
    differing = {
        name for first, second, name in shared_names() if definitions(first)[name] != definitions(second)[name]
    }
    assert differing == set(DIFFERENT_NAMES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_nothing_of_each_other(script):
    modules = {path.removesuffix(".py") for path in SCRIPTS}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            assert not modules & set(names) and getattr(node, "level", 0) == 0


def test_fix_copies_mends_what_has_drifted(tmp_path, monkeypatch):
    for script in SCRIPTS:
        (tmp_path / script).write_text((ROOT / script).read_text().replace("first frame", "last frame"))
    (tmp_path / SCRIPTS[0]).write_text((ROOT / SCRIPTS[0]).read_text())
    originals = [(ROOT / script).read_text() for script in SCRIPTS]
    assert (tmp_path / SCRIPTS[1]).read_text() != originals[1]
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    fix_copies()
    assert [(tmp_path / script).read_text() for script in SCRIPTS] == originals


def fix_copies():
    for i, target in enumerate(SCRIPTS):
        for source in SCRIPTS[:i]:
            theirs, ours = definitions(source), definitions(target)
            path = ROOT / target
            for name in (theirs.keys() & ours.keys()) - DIFFERENT_NAMES.keys():
                if theirs[name] != ours[name]:
                    path.write_text(path.read_text().replace(ours[name], theirs[name]))
                    print(f"{name}: {source} -> {target}")


if __name__ == "__main__":
    fix_copies()
