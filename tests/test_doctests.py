"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest
import torch
from test_siblings import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples(script):
    with torch.random.fork_rng():
        failed, attempted = doctest.testmod(importlib.import_module(script.removesuffix(".py")))
    assert not failed and attempted > 1
