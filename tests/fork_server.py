"""Runs `main(parse_args(ARGUMENTS))` of modules in processes forked from one that has the libraries, when asked to.

A run then starts in a moment instead of ten seconds, so that the tests can kill many. Several processes are told what
torchrun would tell them. Requests come as lines of JSON, process ids and exit codes go out, both through pipes.
"""

import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parent.parent


def serve(requests, answers):
    for line in requests:
        module, args, num_processes, environment = json.loads(line)
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
        print(group, file=answers, flush=True)
        codes = {os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(num_processes)}
        print(*codes, file=answers, flush=True)


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
        (requests, our_requests), (our_answers, answers) = os.pipe(), os.pipe()
        output = open(log, "w", buffering=1)
        if environment:
            self.process = subprocess.Popen(
                [sys.executable, __file__, module, str(requests), str(answers)], pass_fds=[requests, answers],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            ).pid  # fmt: skip
        else:
            self.process = os.fork()
            if self.process == 0:
                for descriptor in (our_requests, our_answers):
                    os.close(descriptor)  # or it would never see the end of the requests
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
                sys.stdout = sys.stderr = output
                logging.root.handlers.clear()  # pytest's
                try:
                    serve(open(requests), open(answers, "w"))
                finally:
                    os._exit(0)
        for descriptor in (requests, answers):
            os.close(descriptor)
        self.requests, self.answers = open(our_requests, "w"), open(our_answers)

    def start(self, args, num_processes=1, module=None, **environment):
        """Returns the id of the process, of several that of the last rank's, which is their group's too."""
        self.end()
        self.start_of_output = self.log.stat().st_size
        print(json.dumps([module or self.module, args, num_processes, environment]), file=self.requests, flush=True)
        self.group = int(self.answers.readline())
        return self.group

    def wait(self):
        """Returns the exit code of all processes; they have to agree in it."""
        self.group = None
        return int(self.answers.readline())

    def end(self):
        """Ends a run that a failed test has left behind."""
        if self.group is not None:
            os.killpg(self.group, signal.SIGKILL)
            self.answers.readline()
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
        self.requests.close()
        os.waitpid(self.process, 0)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


if __name__ == "__main__":
    importlib.import_module(sys.argv[1])  # and with it the libraries that take seconds
    requests, answers = map(int, sys.argv[2:])
    serve(open(requests), open(answers, "w"))
