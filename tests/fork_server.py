"""Imports a script once and runs it in a forked process for every command line on standard input.

    python tests/fork_server.py train_smpo_sd15 DESCRIPTOR

reads a JSON list of arguments a line, and answers each on the file descriptor with the process id and, when that has ended,
with its exit code. A run then starts in a second instead of ten, so that the tests can kill many.
"""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parent.parent


def main():
    script, answers = importlib.import_module(sys.argv[1]), open(int(sys.argv[2]), "w")
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # accelerate would do so in every run
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os.setsid()
            code = 1
            try:
                script.main(script.parse_args(json.loads(line)))
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(process, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)


class ForkServer:
    """Runs of a script in processes of their own, one at a time."""

    def __init__(self, script, log, **environment):
        self.run_id = None
        answers, write_end = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, script, str(write_end)],
            stdin=subprocess.PIPE, stdout=open(log, "w"), stderr=subprocess.STDOUT, pass_fds=[write_end], text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, cwd=ROOT,
        )  # fmt: skip
        os.close(write_end)
        self.answers = open(answers)

    def start(self, args):
        self.end()
        self.process.stdin.write(json.dumps(args) + "\n")
        self.process.stdin.flush()
        self.run_id = int(self.answers.readline())
        return self.run_id

    def wait(self):
        self.run_id = None
        return int(self.answers.readline())

    def end(self):
        """Ends a run that a failed test has left behind."""
        if self.run_id is not None:
            os.killpg(self.run_id, signal.SIGKILL)
            self.wait()

    def run(self, args):
        self.start(args)
        return self.wait()

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
