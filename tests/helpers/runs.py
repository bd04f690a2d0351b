"""Runs of a tiny recipe, as the user's command or as ranks without a launcher."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from tests.helpers import warm
from tests.helpers.ports import free_port
from tests.helpers.warm import REPOSITORY

# A model and a batch that take milliseconds; two micro-batches a step, so that 1 and 2 ranks can share them.
TINY = [
    "--model.num_hidden_layers=2",
    "--model.hidden_size=32",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=48",
    "--data.max_seq_len=32",
    "--data.micro_batch_tokens=256",
    "--data.global_batch_tokens=512",
    "--data.num_workers=0",
    "--run.eval_tokens=768",
    "--run.log_every_steps=1",
    "--run.ops=torch",
]


def last_of_each(flags: list[str]) -> list[str]:
    """Drop every --flag=value that a later one of the same name replaces; a flag given twice is an error."""
    return list({flag.partition("=")[0].replace("-", "_"): flag for flag in flags}.values())


class Corpus(NamedTuple):
    """jsonl: the documents; tokenizer, tokens: folders; texts: the documents themselves."""

    jsonl: Path
    tokenizer: Path
    tokens: Path
    texts: list[str]


class Finished(NamedTuple):
    code: int
    output: str


def run_command(
    command: list[str], timeout_s: float = 300, preload: warm.Preload = "megabert", **environment: str
) -> Finished:
    """Run a command from the repository's root; its output is stdout and stderr together."""
    env = (
        os.environ
        | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment
    )
    process = warm.popen(command, env, preload=preload)
    try:
        output = process.communicate(timeout=timeout_s)[0]
        return Finished(process.wait(), output)
    finally:
        process.kill()


def pretrain_command(
    corpus: Corpus, out: Path, *more: str, ranks: int = 1, launcher: bool = False, ds_config: str | Path = "zero2"
) -> list[str]:
    """The user's command on the tiny recipe; one rank does without the launcher, which saves seconds, unless asked.

    ds_config: the name of one of ours, or a file.
    """
    if isinstance(ds_config, str):
        ds_config = Path("ds_configs", f"{ds_config}.json")
    if launcher or ranks > 1:
        start = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    else:
        start = [sys.executable]
    flags = [f"--ds_config={ds_config}", f"--data.train={corpus.tokens}", f"--run.output_dir={out}", *TINY, *more]
    return [*start, "launch/pretrain.py", *last_of_each(flags)]


def forked_launcher(command: list[str]) -> list[str]:
    """The same `deepspeed` command, which forks its launcher and ranks from the warm process."""
    assert command[0] == "deepspeed"
    return [sys.executable, "tests/helpers/scripts/forked_launcher.py", *command[1:]]


def patched(command: list[str]) -> list[str]:
    """The same command, which first runs the code in the environment variable PATCH."""
    return [word.replace("launch/pretrain.py", "tests/helpers/scripts/patched.py") for word in command]


def start_ranks(command: list[str], ranks: int, **environment: str) -> list[warm.Process]:
    """Start one process per rank, without a launcher, which saves seconds. Only rank 0's output is kept."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | shared | environment
    return [
        warm.popen(command, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, Path(os.devnull) if rank else None)
        for rank in range(ranks)
    ]


def finish_ranks(processes: list[warm.Process], timeout_s: float = 300) -> Finished:
    """Wait for the processes of start_ranks. Returns the highest exit code and rank 0's output."""
    try:
        output = processes[0].communicate(timeout=timeout_s)[0]
        return Finished(max(process.wait(60) for process in processes), output)
    finally:
        for process in processes:
            process.kill()


def run_ranks(corpus: Corpus, out: Path, *more: str, ranks: int, ds_config: str | Path = "zero2") -> Finished:
    """Run the tiny recipe on several ranks without a launcher."""
    return finish_ranks(start_ranks(pretrain_command(corpus, out, *more, ds_config=ds_config), ranks))


def make_printing_venv(folder: Path) -> None:
    """Write a virtual environment whose python only prints its arguments, one on each line."""
    (folder / "bin").mkdir()
    (folder / "bin/activate").write_text(f'PATH="{folder}/bin:$PATH"\n')
    (folder / "bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "bin/python").chmod(0o755)


def ds_config_in(name: str, folder: Path, bf16: bool) -> Path:
    """One of ours with its precision fixed, which otherwise is what the machine is fast at."""
    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    config["torch_autocast"]["enabled"] = bf16
    path = folder / f"{name}-{'bf16' if bf16 else 'fp32'}.json"
    path.write_text(json.dumps(config))
    return path
