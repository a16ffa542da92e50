"""Runs `main(parse_args(ARGUMENTS))` of modules in processes forked from one that has the libraries, when asked to.

A run then starts in a moment instead of ten seconds, so that the tests can kill many. Several processes are told what
torchrun would tell them.
"""

import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).parent.parent


def serve(module, log, connection, other_end):
    """Runs what the connection asks for, and answers with process ids and exit codes, until it is closed."""
    other_end.close()
    multiprocessing.set_start_method(None, force=True)  # the default, for what runs here
    sys.stdout = sys.stderr = output = open(log, "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    logging.root.handlers.clear()  # pytest's
    importlib.import_module(module)  # and with it the libraries that take seconds
    with suppress(EOFError):
        while True:
            run_several(connection, *connection.recv())


def run_several(connection, args, num_processes, module, environment):
    world = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    group = 0
    for rank in reversed(range(num_processes)):
        process = os.fork()
        if process == 0:
            os.environ.update(environment)
            if num_processes > 1:
                os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(exit_code(module, args))
        group = group or process
        os.setpgid(process, group)
    connection.send(group)
    connection.send({os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(num_processes)})


def exit_code(module, args):
    code = 1
    try:
        if module.endswith(".py"):
            run_alone(Path(module), args)
        else:
            module = importlib.import_module(module)
            module.main(module.parse_args(args))
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_alone(script, args):
    """`python SCRIPT ARGUMENTS` in the script's folder, where it finds nothing of this repository."""
    ours = {ROOT, *(ROOT / "tests").rglob("")}
    sys.path = [path for path in sys.path if Path(path).resolve() not in ours]
    for path in ROOT.glob("*.py"):
        sys.modules.pop(path.stem, None)
    os.chdir(script.parent)
    sys.argv = [str(script), *args]
    runpy.run_path(str(script), run_name="__main__")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class ForkServer:
    """Runs of a module, one at a time, each in a process group of its own; a run may name another module, or a script
    by its path, which is then alone in its folder.

    They are forked from this process as it is, or, if an `environment` is given that the libraries have to find when
    they are imported, from a new one.
    """

    def __init__(self, module, log, **environment):
        self.module, self.group, self.log, self.start_of_output = module, None, Path(log), 0
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn" if environment else "fork")
        self.process = context.Process(target=serve, args=(module, log, theirs, self.connection))
        self.log.touch()
        with mock.patch.dict(os.environ, environment):
            self.process.start()
        theirs.close()

    def start(self, args, num_processes=1, module=None, **environment):
        """Returns the id of the process, of several that of the last rank's, which is their group's too."""
        self.end()
        self.start_of_output = self.log.stat().st_size
        self.connection.send((args, num_processes, module or self.module, environment))
        self.group = self.connection.recv()
        return self.group

    def wait(self):
        """Returns the exit code of all processes; they have to agree in it."""
        self.group = None
        (code,) = self.connection.recv()
        return code

    def end(self):
        """Ends a run that a failed test has left behind."""
        if self.group is not None:
            os.killpg(self.group, signal.SIGKILL)
            self.connection.recv()
            self.group = None

    def run(self, args, num_processes=1, module=None, **environment):
        self.start(args, num_processes, module, **environment)
        return self.wait()

    def output(self):
        """What the newest run has printed."""
        return self.log.read_bytes()[self.start_of_output :].decode()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()
        self.connection.close()
        self.process.join()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
