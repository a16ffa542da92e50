"""The examples in the docstrings of the maths, which every function there has, give what they say."""

import ast
import doctest
import importlib
import re

import pytest
import torch
from test_siblings import ROOT, SCRIPTS


ROOM = r"^# The (?:maths|statistics)[^\n]*\n# -+\n(.*?)\n# -+\n"


def functions_of_the_maths(script):
    """What stands between the heading of the first room of a script and the next heading."""
    (source,) = re.findall(ROOM, (ROOT / script).read_text(), re.M | re.S)
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_of_the_maths(script):
    module = importlib.import_module(script.removesuffix(".py"))
    with torch.random.fork_rng():
        found = {test.name.split(".")[-1]: test for test in doctest.DocTestFinder().find(module) if test.examples}
        runner = doctest.DocTestRunner(verbose=False)
        for test in found.values():
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    names = functions_of_the_maths(script)
    assert len(names) > 1 and not set(names) - set(found)
