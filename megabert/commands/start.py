"""Start the installed commands: each function imports its command once Ctrl-C ends the process without a traceback."""

import importlib
import signal
from functools import partial


def _start(module: str) -> None:
    # Without Python's own handler, Ctrl-C during the imports ends this process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    importlib.import_module(module).command()


pretrain = partial(_start, "megabert.commands.pretrain")
export = partial(_start, "megabert.commands.export")
import_hf = partial(_start, "megabert.commands.import_hf")
finetune = partial(_start, "megabert.commands.finetune")
write_shards = partial(_start, "data_prep.write_shards")
train_tokenizer = partial(_start, "data_prep.train_tokenizer")
