"""Start the installed commands: each function imports its command once Ctrl-C ends the process without a traceback."""

import importlib
from functools import partial

from megabert.process.interrupts import end_at_ctrl_c


def _start(module: str) -> None:
    end_at_ctrl_c()
    importlib.import_module(module).command()


pretrain = partial(_start, "megabert.commands.pretrain")
export = partial(_start, "megabert.commands.export")
import_hf = partial(_start, "megabert.commands.import_hf")
finetune = partial(_start, "megabert.commands.finetune")
write_shards = partial(_start, "data_prep.write_shards")
train_tokenizer = partial(_start, "data_prep.train_tokenizer")
