"""Run the `deepspeed` command, whose launcher and ranks are forks that have loaded torch and DeepSpeed already.

They have the same parents, group and signals as with exec; only their command lines are this process's.

python tests/helpers/scripts/forked_launcher.py --num_gpus 1 launch/pretrain.py ...
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from deepspeed.launcher import runner

Popen = subprocess.Popen


class ForkedPopen(Popen):
    """A Popen that forks for `python -u [-m] MODULE-OR-SCRIPT ...`, and does not exec."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        if list(args[:2]) != [sys.executable, "-u"]:
            # pyrefly: ignore[missing-attribute]
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        sys.stdout.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(env)
            os._exit(run_main(args[2:]))


def run_main(arguments: list[str]) -> int:
    """Run a script, or a module after -m, as __main__ and return its exit code."""
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    sys.path[0] = os.getcwd() if module else str(Path(sys.argv[0]).resolve().parent)
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            subprocess.Popen = Popen  # type: ignore[misc]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    subprocess.Popen = ForkedPopen  # type: ignore[misc]
    runner.main()
