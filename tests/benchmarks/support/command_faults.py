"""Kill the commands that prepare data, convert and fine-tune, at random moments, and start them again."""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from support.report import write

from data_prep.sources.docstrings import docstrings

REPOSITORY = Path(__file__).resolve().parents[3]
MARK = "MEGABERT_FAULT_ROUND"
ORPHAN_S = 5.0
TIMEOUT_S = 900.0
NUM_COMMANDS = 5
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What a command writes anew in every run, such as times, and what contains the path of the output.
VOLATILE = {"request", "results.json", "results.md", "results.png", "summary.json", "times.tsv", "run.json"}

TIMES = {"seconds", "examples_per_s", "content_sha256"}


@dataclass(frozen=True)
class Command:
    """A command to kill. out: what it writes; argv(out): its words.

    is_resumed: it continues what an earlier start wrote, so that `out` may exist before it is complete.
    """

    name: str
    argv: Callable[[Path], list[str]]
    is_resumed: bool = False


def commands(base: Path) -> Iterator[Command]:
    """Make the inputs of every command below `base`, with small sizes, and yield the commands."""
    python = sys.executable
    text, tokenizer, tokens = base / "text", base / "tokenizer", base / "tokens"
    write_docstrings(text)
    train = [python, "data_prep/train_tokenizer.py", f"--source={text}", "--vocab_size=2000", "--sample_bytes=2000000"]
    yield Command("train_tokenizer", lambda out: [*train, f"--out={out}"])
    run([*train, f"--out={tokenizer}"])
    shards = [python, "data_prep/write_shards.py", f"--source={text}", f"--tokenizer={tokenizer}", "--heldout=0.01"]
    yield Command("write_shards", lambda out: [*shards, f"--out={out}"], is_resumed=True)
    run([*shards, f"--out={tokens}"])
    pretrain = [python, "launch/pretrain.py", "--ds_config=ds_configs/zero2.json", f"--data.train={tokens}"]
    pretrain += ["--run.max_steps=4", f"--run.output_dir={base / 'run'}", "--run.eval_tokens=4096"]
    run(pretrain)
    export = [python, "launch/convert_to_hf.py", str(base / "run")]
    yield Command("export", lambda out: [*export, str(out)])
    run([*export, str(base / "exported")])
    yield Command("import", lambda out: [python, "launch/convert_from_hf.py", str(base / "exported"), str(out)])
    finetune = [python, "launch/finetune_glue.py", f"--checkpoint={base / 'exported'}", "--protocol=quickstart"]
    run([python, "data_prep/fetch_tasks.py"])
    finetune += ["--task-file=data_prep/tasks/movie-sentiment.yaml"]
    yield Command("finetune", lambda out: [*finetune, f"--out={out}"], is_resumed=True)


def write_docstrings(folder: Path) -> None:
    """Write the docstrings of Python's own modules, which are a corpus of 2 MB, as .txt files."""
    folder.mkdir(parents=True)
    for module in sorted(Path(argparse.__file__).parent.glob("*.py")):
        for number, text in enumerate(docstrings(module)):
            (folder / f"{module.stem}-{number:03d}.txt").write_text(text)


def run(argv: list[str], **changes: str) -> None:
    """Run a command to its end. Raises CalledProcessError if it fails."""
    subprocess.run(argv, cwd=REPOSITORY, env=environment(**changes), check=True, stdout=subprocess.DEVNULL)


def environment(**changes: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path} | changes


class CommandFaults:
    """Kill one command many times. Counts: kills, same_bytes, half_outputs, orphans."""

    def __init__(self, command: Command, folder: Path):
        self.command, self.folder = command, folder
        self.counts = {"kills": 0, "same_bytes": 0, "half_outputs": 0, "orphans": 0}
        whole = folder / "whole"
        began = time.monotonic()
        run(command.argv(whole))
        self.seconds = time.monotonic() - began
        self.expected = digests(whole)

    def strike(self, rng: random.Random) -> str:
        """Kill the command once, at a random moment, start it again, and compare; returns what happened."""
        out = self.folder / f"round-{self.counts['kills']}" / "out"
        out.parent.mkdir()
        mark = uuid.uuid4().hex
        log = (out.parent / "log.txt").open("w")
        process = subprocess.Popen(
            self.command.argv(out), cwd=REPOSITORY, env=environment(**{MARK: mark}), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        after, number = rng.uniform(0, self.seconds), rng.choice(SIGNALS)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.wait(TIMEOUT_S)
        self.counts["kills"] += 1
        left = orphans(mark)
        self.counts["orphans"] += bool(left)
        half = out.exists() and not self.command.is_resumed and digests(out) != self.expected
        self.counts["half_outputs"] += half
        run(self.command.argv(out))
        strangers = sorted(path.name for path in out.parent.iterdir() if path.name not in ("out", "log.txt"))
        same = digests(out) == self.expected and not strangers
        self.counts["same_bytes"] += same
        if same:
            shutil.rmtree(out.parent)
        return (
            f"{self.command.name}: {number.name} after {after:.2f} of {self.seconds:.2f} s"
            f"{', an output that is not whole' if half else ''}{f', orphans {left}' if left else ''}"
            f"{'' if same else f', OTHER BYTES in {out.parent} {strangers}'}"
        )


def digests(out: Path) -> dict[str, str]:
    """The hash of every file of an output, by name, without those that differ in every run."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()] if out.is_dir() else [out]
    return {
        str(path.relative_to(out)): hashlib.sha256(_without_times(path)).hexdigest()
        for path in files
        if path.name not in VOLATILE and path.suffix not in (".log", ".lock") and path.name != "README.md"
    }


def _without_times(path: Path) -> bytes:
    """The bytes of a file; of one fine-tuning's result, without its times and their hash."""
    if path.parent.name != "jobs":
        return path.read_bytes()
    kept = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in TIMES}
    return json.dumps(kept).encode()


def orphans(mark: str) -> list[str]:
    """The processes of a round that are alive ORPHAN_S after its end; they are killed."""
    until = time.monotonic() + ORPHAN_S
    while (alive := list(_marked(mark))) and time.monotonic() < until:
        time.sleep(0.05)
    for process in alive:
        process.kill()
    return [" ".join(process.info["cmdline"] or [])[:120] for process in alive]


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def kill_commands(base: Path, seed: int, rounds: int | None, file: Path | None) -> int:
    """Kill the commands around pretraining, one after the other; returns the exit code.

    rounds: kills in all; None: one of each command. file: for the figures.
    """
    rng = random.Random(seed)
    faults: list[CommandFaults] = []
    for number, command in enumerate(commands(base / "inputs")):
        folder = base / command.name
        folder.mkdir()
        faults.append(CommandFaults(command, folder))
        for _ in range(1 if rounds is None else len(range(number, rounds, NUM_COMMANDS))):
            print(f"round {sum(one.counts['kills'] for one in faults) + 1}: {faults[-1].strike(rng)}", flush=True)
    totals = {name: sum(one.counts[name] for one in faults) for name in faults[0].counts}
    print(", ".join(f"{count} {name}" for name, count in totals.items()))
    write(totals, file)
    good = totals["same_bytes"] == totals["kills"] and not totals["half_outputs"] and not totals["orphans"]
    if good:
        shutil.rmtree(base)
    return 0 if good else 1
