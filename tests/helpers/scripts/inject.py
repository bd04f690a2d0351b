"""Run launch/pretrain.py with a fault: multiply the loss of some bins by a factor, or add to it, as bad data would.

It also prints how many optimizers are in memory when a rollback builds its engine. run.cuda_graphs is false: a graph
would repeat its first micro-batch's loss, with or without the fault.

INJECT='{"bins": [6, 7], "factor": "nan", "added": 0}' python tests/helpers/scripts/inject.py ...
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import torch

from megabert.data.batch import PackedBatch
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training import loop

FAULT = json.loads(os.environ["INJECT"])
current = -1
inputs, loss, start = PackedBatch.model_inputs, MegaBertForMaskedLM.masked_loss, loop.start_engine


def model_inputs(self: PackedBatch, device):
    global current
    current = self.index
    return inputs(self, device)


def masked_loss(model, *args, **options):
    output = loss(model, *args, **options)
    if model.training and current in FAULT["bins"]:
        loss_sum = output.loss_sum * float(FAULT["factor"]) + float(FAULT["added"])
        output = output._replace(loss_sum=loss_sum)
    return output


def start_engine(plan, corpus, gate, checkpoint):
    optimizers = sum(isinstance(found, torch.optim.Optimizer) for found in gc.get_objects())
    sys.stdout.write(f"optimizers before the rollback's engine: {optimizers}\n")
    sys.stdout.flush()
    return start(plan, corpus, gate, checkpoint)


loop.start_engine = start_engine
PackedBatch.model_inputs = model_inputs
MegaBertForMaskedLM.masked_loss = masked_loss
sys.argv.append("--run.cuda_graphs=false")
runpy.run_path(str(Path(__file__).parents[3] / "launch/pretrain.py"), run_name="__main__")
