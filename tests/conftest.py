"""Fixtures: the tiny models and data, and ways to run the scripts in this process and to read what they logged."""

import logging
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything that the tests need lies in tests/tiny
# Runs are bit for bit the same with one number of threads: one here and in all processes that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import importlib
import io
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fork_server import ForkServer


# What takes seconds to import is imported where it is needed: the process that hands out the tests loads this file
# too.

collect_ignore = ["upstream"]  # tests of a folder that `make upstream` makes

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"

TWO_PROCESSES = {"num_processes": 2, "ACCELERATE_USE_CPU": "true"}  # for `server`


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="Run what is marked slow, too, and kill runs twenty times.")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="session")
def num_kills(pytestconfig):
    """How often the kill tests kill."""
    return 20 if pytestconfig.getoption("--slow") else 4


@contextmanager
def process_restored():
    """Takes back what a run leaves in its process: accelerate's state, signal handlers, the umask, silenced logs."""
    forget_accelerator()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers, umask = [signal.getsignal(number) for number in numbers], os.umask(0o022)
    yield
    os.umask(umask)
    logging.disable(logging.NOTSET)
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    forget_accelerator()
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(autouse=True)
def fresh_process():
    with process_restored():
        yield


def forget_accelerator():
    """Lets the next run in this process choose its precision and its engine."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def labels_path(tmp_path_factory):
    """Labels of the tiny training pairs, by the real script."""
    path = tmp_path_factory.mktemp("labels") / "labels.parquet"
    relabel(output_path=path)
    return path


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    """Runs of train_smpo_sd15.py, or of another module, in processes of their own, forked before any test has run."""
    import datasets

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # five seconds after each stream
    gc.freeze()  # every run collects garbage: a million objects of the libraries need no look
    with ForkServer("train_smpo_sd15", tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


@pytest.fixture
def load(tmp_path):
    """The tiny training pairs with human labels, or other ones, as train_smpo_sd15.py has them, and its arguments."""
    from accelerate import PartialState

    import train_smpo_sd15

    def load(**flags):
        PartialState()  # the logger asks it which process this is
        args = train_smpo_sd15.parse_args(train_flags(tmp_path / "new", **{"label_column": "label_0", **flags}))
        data = train_smpo_sd15.load_data("dataset_split_name", args)
        return train_smpo_sd15.select_pairs(data, 1000, args), args

    return load


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A pipeline with SDXL's blocks and layers, small widths and random weights."""
    import torch
    from random_models import write_sdxl

    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    write_sdxl(folder)
    return folder


def command_line(**flags):
    """`flag=value` as a list of arguments; True stands for a bare flag, a list for several values, None for no
    flag."""
    args = []
    for flag, value in flags.items():
        if value is None:
            continue
        args.append(f"--{flag}")
        if value is not True:
            args.extend(str(item) for item in (value if isinstance(value, list) else [value]))
    return args


def relabel(**flags):
    """Runs relabel_pickapic.py on the tiny pairs."""
    import relabel_pickapic

    defaults = {"dataset_name": TINY / "pairs", "reward_model": TINY / "pickscore"}
    relabel_pickapic.main(relabel_pickapic.parse_args(command_line(**{**defaults, **flags})))


def train_flags(output_dir, **flags):
    """Command line of a short training run on the tiny model."""
    return command_line(
        **{
            "pretrained_model_name_or_path": TINY / "sd15",
            "dataset_name": TINY / "pairs",
            "output_dir": output_dir,
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "num_inversion_steps": None if flags.get("noising") == "forward" else 3,
            "learning_rate": 1e-4,
            "no_hflip": True,
            "seed": 1,
            **flags,
        }
    )


def train(output_dir, script="train_smpo_sd15", **flags):
    """Runs a training script and returns what it logged: `{metric: [value of each step]}`."""
    script = importlib.import_module(script) if isinstance(script, str) else script
    script.main(script.parse_args(train_flags(output_dir, **flags)))
    return read_logs(output_dir)


def train_sdxl(output_dir, sdxl, **flags):
    """Runs train_smpo_sdxl.py on the tiny SDXL."""
    return train(output_dir, "train_smpo_sdxl", **{"pretrained_model_name_or_path": sdxl, **flags})


def write_pairs(path, rows=8, row_group_size=None, **columns):
    """The first tiny pairs with columns put in place of theirs."""
    table = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, rows)
    for name, values in columns.items():
        table = with_column(table, name, values)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def with_column(table, name, values):
    """A table with values in place of a column's, or in a new one."""
    column, i = pa.array(values), table.schema.get_field_index(name)
    return table.append_column(name, column) if i < 0 else table.set_column(i, name, column)


def damage(path, row_group, column):
    """Overwrites where a column of a row group begins in a Parquet file."""
    pages = pq.ParquetFile(path).metadata.row_group(row_group).column(pq.read_schema(path).names.index(column))
    with open(path, "r+b") as file:
        file.seek(pages.dictionary_page_offset or pages.data_page_offset)
        file.write(bytes(40))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def split_pairs(folder, rows):
    """The tiny training pairs as Parquet files of so many rows each, in row groups of 16."""
    folder.mkdir()
    table = pq.read_table(TINY / "pairs" / "train.parquet")
    for i, start in enumerate(range(0, len(table), rows)):
        pq.write_table(table.slice(start, rows), folder / f"train-{i:05d}.parquet", row_group_size=16)
    return folder


def assert_same_labels(path, other_path, atol=0.0):
    """Two labels files hold the same but for their metadata, and their numbers within a tolerance."""
    labels, others = pq.read_table(path), pq.read_table(other_path)
    assert labels.column_names == others.column_names
    for name in labels.column_names:
        if pa.types.is_floating(labels[name].type):
            np.testing.assert_allclose(labels[name].to_numpy(), others[name].to_numpy(), rtol=0, atol=atol)
        else:
            assert labels[name].to_pylist() == others[name].to_pylist()


def read_logs(output_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = {}
    for folder in sorted(Path(output_dir).rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            logs.setdefault(name, []).extend(event.value for event in events.Scalars(name))
    return logs


def same_weights(first, second):
    """Whether two files hold the same tensors, bit for bit."""
    from safetensors.torch import load_file

    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def unet_weights(folder):
    """Weights of the UNet in a folder, as a dict of tensors."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()


def names_in(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def run_script(*args, cwd, launcher=()):
    """Runs a script in a process of its own, as a user does, and returns its output."""
    command = [sys.executable, *launcher, *(str(arg) for arg in args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
