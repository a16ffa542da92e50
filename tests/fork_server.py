"""Imports a module once and runs its or another's `main(parse_args(ARGUMENTS))` in forked processes, when asked to.

    python tests/fork_server.py train_smpo_sd15 DESCRIPTOR

A run then starts in a second instead of ten, so that the tests can kill many. Several processes are told what torchrun
would tell them. Requests come as lines of JSON on standard input, process ids and exit codes go out on the descriptor.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parent.parent


def main():
    importlib.import_module(sys.argv[1])  # and with it the libraries that take seconds
    answers = open(int(sys.argv[2]), "w")
    for line in sys.stdin:
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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class ForkServer:
    """Runs of a module, or of another one where a run names it, one at a time, each in a process group of its own."""

    def __init__(self, module, log, **environment):
        self.module, self.group, self.log, self.start_of_output = module, None, Path(log), 0
        answers, write_end = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, module, str(write_end)],
            stdin=subprocess.PIPE, stdout=open(log, "w"), stderr=subprocess.STDOUT, pass_fds=[write_end], text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, cwd=ROOT,
        )  # fmt: skip
        os.close(write_end)
        self.answers = open(answers)

    def start(self, args, num_processes=1, module=None, **environment):
        """Returns the id of the process, of several that of the last rank's, which is their group's too."""
        self.end()
        self.start_of_output = self.log.stat().st_size
        self.process.stdin.write(json.dumps([module or self.module, args, num_processes, environment]) + "\n")
        self.process.stdin.flush()
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
        self.process.stdin.close()
        self.process.wait()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


if __name__ == "__main__":
    main()
