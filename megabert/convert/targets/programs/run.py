"""Run a target's own program in a process of its own, which cannot import megabert, and read its answer."""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from megabert.convert.targets.target import DiffersError
from megabert.process.subprocesses import end_with_parent, why_ended

HERE = Path(__file__).parent


class Answer(NamedTuple):
    """The answers of a program to the questions that it was asked. version: its own; array: the bytes of a .npy file.

    ids: of each line; words: the id of the best word for each question; rows: an embedding of each text.
    """

    version: str
    array: io.BytesIO
    ids: list[list[int]]
    words: list[int]
    rows: list[list[float]]


def run_python(script: str, folder: Path, texts: list[str], **options: Any) -> Answer:
    """Run a file of this folder with this Python. Raises DiffersError, which says why, if it fails or is killed."""
    return run([sys.executable, "-P", str(HERE / script)], folder, texts, **options)


def run(command: list[str], folder: Path, texts: list[str], **options: Any) -> Answer:
    """Run `command FOLDER SCRATCH`, which reads SCRATCH/question.json and writes answer.json, and maybe answer.npy."""
    with tempfile.TemporaryDirectory() as scratch:
        question = Path(scratch) / "question.json"
        question.write_text(json.dumps({"texts": texts, **options}), encoding="utf-8")
        # transformers copies a folder's code into this cache, under the folder's name only.
        cache = {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, str(folder.resolve()), scratch],
            cwd=scratch,
            env=os.environ | cache,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            preexec_fn=end_with_parent,
        )
        if done.returncode:
            raise DiffersError(f"cannot be opened: {why_ended(done.returncode, done.stderr)}")
        answer = json.loads((Path(scratch) / "answer.json").read_text(encoding="utf-8"))
        array = Path(scratch) / "answer.npy"
        data = io.BytesIO(array.read_bytes() if array.is_file() else b"")
        return Answer(answer["version"], data, *(answer.get(name, []) for name in ("ids", "words", "rows")))
