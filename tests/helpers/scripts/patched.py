"""Run launch/pretrain.py after the Python code in the environment variable PATCH, to replace a clock or count calls.

PATCH='import os; ...' python tests/helpers/scripts/patched.py ...
"""

import os
import runpy
from pathlib import Path

exec(compile(os.environ["PATCH"], "PATCH", "exec"), {})
runpy.run_path(str(Path(__file__).parents[3] / "launch/pretrain.py"), run_name="__main__")
