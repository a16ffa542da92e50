"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest
import torch
from test_siblings import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples(script):
    module = importlib.import_module(script.removesuffix(".py"))
    with torch.random.fork_rng():
        found = {test.name.split(".")[-1]: test for test in doctest.DocTestFinder().find(module) if test.examples}
        runner = doctest.DocTestRunner(verbose=False)
        for test in found.values():
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    assert len(found) > 1
