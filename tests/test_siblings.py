"""What two scripts share stands in both, to the letter.

Each script runs when copied alone, so there is no module to share. Any function, class or constant at the top level of
two scripts must be identical, and a flag of two scripts must have the same type, choices, help and default, unless a
table here says why not. `python tests/test_siblings.py` (`make fix-copies`) copies the shared functions and classes of
the script that stands first in `SCRIPTS` into the others.
"""

import argparse
import ast
import functools
import importlib
import inspect
import itertools
from pathlib import Path
from unittest import mock

import pytest


ROOT = Path(__file__).parent.parent
TRAINING = ("train_smpo_sd15.py", "train_smpo_sdxl.py")
SCRIPTS = [*TRAINING, "relabel_pickapic.py", "evaluate_smpo.py"]
PAIRS = list(itertools.combinations(SCRIPTS, 2))

# name: why the two training scripts may differ in it
DIFFERENT_TRAINING = {
    **dict.fromkeys(["PIPELINE", "PIPELINE_OPTIONS", "ADDITION_EMBED_TYPE", "ACCEPTED_MODELS"], "the model"),
    **dict.fromkeys(["MODEL_LICENSE", "MODEL_TAG"], "the model"),
    **dict.fromkeys(["TOKENIZERS", "TEXT_ENCODERS"], "SDXL has two"),
    "RELEASED_LEVELS": "published: 5 and 10",
    "VAE_BATCH_SIZE": "an image of 1024 pixels is four of 512, and in fp32",
    "parse_args": "the description and the defaults of DIFFERENT_TRAINING_FLAGS",
    "VAE_MAY_OVERFLOW": "SDXL's own does in half precision",
    "encode_prompts": "SDXL has two text encoders and takes a pooled embedding",
    "call_unet": "SDXL takes more conditions",
}
# name: why any other two scripts that have it may differ
DIFFERENT_NAMES = {
    **dict.fromkeys(["parse_args", "resolve"], "each script has flags of its own"),
    "main": "each script does something else",
}
# (flag, property): why
DIFFERENT_TRAINING_FLAGS = {
    ("resolution", "default"): "SDXL's is 1024",
    ("beta_dpo", "default"): "published: 2000 and 5000",
    ("optimizer", "default"): "published: AdamW and Adafactor",
    ("inversion_batch_size", "default"): "a UNet call of SDXL at 1024 pixels takes four times the memory",
}
DIFFERENT_FLAGS = {
    ("hub_public", "help"): "labels in one, a model in the other",
    ("seed", "help"): "seeds a training run in one and images in the other",
    ("dataset_name", "required"): "prompts may come from a text file, pairs from two folders",
    ("reward_model", "nargs"): "labels are of one reward, an evaluation of several",
    ("reward_model", "default"): "labels are of one reward, an evaluation of several",
    ("reward_model", "help"): "labels are of one reward, an evaluation of several",
    ("output_dir", "help"): "the scripts write different things",
    ("batch_size", "help"): "images to score in one, images to draw in the other",
    ("batch_size", "default"): "drawing an image takes more memory than scoring it",
    ("dataloader_num_workers", "help"): "scoring waits for images, training does not",
    ("streaming", "help"): "scoring reads files in order, training has to shuffle them",
    ("push_to_hub", "help"): "labels in one, a model in the other",
    ("resolution", "default"): "evaluation serves both models",
    ("report_to", "default"): "an evaluation's folder has all that trackers would get",
}


def exemptions(first, second, of_training, of_others):
    return of_training if (first, second) == TRAINING else of_others


def definitions(script):
    """`{name: source}` of what stands at the top level, decorators included."""
    return definitions_in((ROOT / script).read_text())


@functools.lru_cache
def definitions_in(source):
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start, names = min([node.lineno, *(d.lineno for d in node.decorator_list)]), [node.name]
        elif isinstance(node, ast.Assign):
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            start, names = node.lineno, [name.id for name in stored]
        else:
            continue
        found |= dict.fromkeys(names, "\n".join(lines[start - 1 : node.end_lineno]))
    return found


class Found(Exception):
    """Carries a parser out of the function that makes it."""


def parser_of(make_and_parse):
    """The parser that a function makes and parses with."""

    def found(parser, *args, **kwargs):
        raise Found(parser)

    with mock.patch.multiple(argparse.ArgumentParser, parse_args=found, parse_known_args=found):
        try:
            make_and_parse()
        except Found as carrier:
            return carrier.args[0]


def script_parser(script):
    return parser_of(importlib.import_module(script.removesuffix(".py")).parse_args)


def differing(first, second):
    """Names that stand at the top level of both scripts and are not the same."""
    ours, theirs = definitions(first), definitions(second)
    return {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}


def type_of(action):
    """The name of a flag's type, or what the function that `checked` has made accepts."""
    if not inspect.isfunction(action.type):
        return action.type
    return inspect.getclosurevars(action.type).nonlocals.get("accepted", action.type.__name__)


def flags(script):
    """`{flag: its properties}` of a script's parser."""
    keys, found = "choices help default nargs required option_strings".split(), {}
    for action in script_parser(script)._actions:
        found[action.dest] = {"type": type_of(action), **{key: getattr(action, key) for key in keys}}
    return found


def may_differ(first, second):
    return exemptions(first, second, DIFFERENT_TRAINING, DIFFERENT_NAMES)


@pytest.mark.parametrize("first, second", PAIRS)
def test_shared_names_are_identical(first, second):
    drifted = sorted(differing(first, second) - may_differ(first, second).keys())
    assert drifted == [], "run `make fix-copies`"


def test_shared_flags_are_identical():
    problems, used = [], {id(DIFFERENT_TRAINING_FLAGS): set(), id(DIFFERENT_FLAGS): set()}
    of_script = {script: flags(script) for script in SCRIPTS}
    for first, second in PAIRS:
        exempt = exemptions(first, second, DIFFERENT_TRAINING_FLAGS, DIFFERENT_FLAGS)
        for flag in of_script[first].keys() & of_script[second].keys():
            for key, value in of_script[first][flag].items():
                if value != of_script[second][flag][key]:
                    used[id(exempt)].add((flag, key))
                    if (flag, key) not in exempt:
                        problems.append(f"--{flag}: {key} differs between {first} and {second}")
    assert not problems
    for exempt in (DIFFERENT_TRAINING_FLAGS, DIFFERENT_FLAGS):
        assert used[id(exempt)] == set(exempt), "stale exemptions"


def test_the_training_scripts_have_the_same_flags_and_functions():
    assert flags(TRAINING[0]).keys() == flags(TRAINING[1]).keys()
    assert list(definitions(TRAINING[0])) == list(definitions(TRAINING[1]))


def test_no_exemption_is_stale():
    assert differing(*TRAINING) == set(DIFFERENT_TRAINING)
    assert set().union(*(differing(*pair) for pair in PAIRS if pair != TRAINING)) == set(DIFFERENT_NAMES)


def test_one_changed_line_of_a_shared_function_is_found_and_mended(tmp_path, monkeypatch):
    originals = {script: (ROOT / script).read_text() for script in SCRIPTS}
    drifted = {**originals, SCRIPTS[2]: originals[SCRIPTS[2]].replace("ImageOps.exif_transpose(", "ImageOps.mirror(")}
    assert drifted != originals
    for script, text in drifted.items():
        (tmp_path / script).write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="decode_image"):
        test_shared_names_are_identical(TRAINING[0], SCRIPTS[2])
    fix_copies()
    assert {script: (tmp_path / script).read_text() for script in SCRIPTS} == originals


def fix_copies():
    for i, target in enumerate(SCRIPTS):
        for source in SCRIPTS[:i]:
            theirs, ours = definitions(source), definitions(target)
            path = ROOT / target
            for name in differing(source, target) - may_differ(source, target).keys():
                path.write_text(path.read_text().replace(ours[name], theirs[name]))
                print(f"{name}: {source} -> {target}")


if __name__ == "__main__":
    fix_copies()
