"""A BERT of transformers that runs in milliseconds, made-up data, and options of the command for both."""

import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from megabert.finetune.jobs import runner
from megabert.finetune.options import FinetuneOptions
from tests.finetune.helpers.layouts import write_tsv

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "cat", "sat", "on", "and", "so", "side", "mat", "good", "bad"),
    *(str(number) for number in range(12)),
    *("##s", '"', ",", "'"),
]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="session", autouse=True)
def forkserver_with_torch() -> None:
    """Fork the processes of jobs from a server that has imported torch, even if another test started one without."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    multiprocessing.set_forkserver_preload(["megabert.finetune.jobs.runner"])


class EndedProcess:
    """What the runner sees of a process that has ended."""

    def __init__(self, exitcode: int):
        self.exitcode = exitcode
        # Always ready to be read, as the sentinel of a process that has ended.
        self.file = open(os.devnull)
        self.sentinel = self.file.fileno()

    def join(self) -> None:
        self.file.close()

    kill = join


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Run the jobs in the test's process, which takes a tenth of the time."""

    def start_process(job, context, slot, start, request) -> EndedProcess:
        try:
            runner.run_and_write(job, context, slot, start, request)
        except ValueError:
            (context.jobs / f"{job.name}.log").write_text(traceback.format_exc())
            return EndedProcess(1)
        return EndedProcess(0)

    monkeypatch.setattr(runner, "start_process", start_process)


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **SHAPE)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="session")
def glue(tmp_path_factory) -> Path:
    return write_tsv(tmp_path_factory.mktemp("glue"))


PROTOCOL = """
seeds: [1, 2]
settings: {lr: 1.0e-3, epochs: 1, batch_size: 8, max_seq_len: 32}
tasks:
  mnli: {seeds: [1]}
  rte: {start: mnli}
  stsb: {start: mnli, seeds: [1], metrics: [spearman]}
  cola: {seeds: [1], sweep: {lr: [1.0e-4, 1.0e-3]}}
"""


@pytest.fixture
def options_for(bert, glue, tmp_path):
    """Options for the small model, with a protocol file to edit."""
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    shared = {"checkpoint": str(bert), "data": str(glue), "protocol": str(tmp_path / "tiny.yaml"), "ops": "torch"}
    return lambda **more: FinetuneOptions(**(shared | {"out": str(tmp_path / "out")} | more))
