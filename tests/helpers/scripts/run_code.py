"""Run Python code as `python -c CODE ARGUMENT ...` does; warm.py forks it from a process that has loaded torch.

python tests/helpers/scripts/run_code.py CODE ARGUMENT ...
"""

import sys

if __name__ == "__main__":
    del sys.argv[0]
    exec(compile(sys.argv[0], "<code>", "exec"), {"__name__": "__main__"})
