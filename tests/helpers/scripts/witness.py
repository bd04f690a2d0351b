"""Run launch/pretrain.py and record which bins each rank trains on: a line {"step", "bins"} per step.

WITNESS=folder/0 python tests/helpers/scripts/witness.py ...    writes folder/0-RANK.jsonl
"""

import json
import os
import runpy
from pathlib import Path

import deepspeed

from megabert.training import loop

take_step = loop.take_step


def recorded_step(run, batches, num_masked):
    with open(f"{os.environ['WITNESS']}-{deepspeed.comm.get_rank()}.jsonl", "a") as file:
        file.write(json.dumps({"step": run.state.step + 1, "bins": [batch.index for batch in batches]}) + "\n")
    return take_step(run, batches, num_masked)


loop.take_step = recorded_step
runpy.run_path(str(Path(__file__).parents[3] / "launch/pretrain.py"), run_name="__main__")
