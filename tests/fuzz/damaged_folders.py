"""Damaged shards, checkpoints and Hugging Face folders: a reader must refuse them, or read what was written."""

import argparse
import decimal
import functools
import hashlib
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np

from data_prep import train_tokenizer, write_shards
from data_prep.sources.docstrings import docstrings
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.convert.from_hf import read_and_resize
from megabert.convert.hf.tokenizer import read_hf_tokenizer
from megabert.convert.to_hf import export_checkpoint
from megabert.data.order import cut_into_splits
from megabert.data.shards.source import open_corpus
from megabert.data.stream import positions_from_json
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.fuzz.mutations import damage_file
from tests.fuzz.outcome import Case


def shard_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield folders of token shards with one damaged file."""
    return _damaged(_write_shards(folder), random, _read_shards)


def checkpoint_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield checkpoints with one damaged file, for the readers that do without DeepSpeed."""
    return _damaged(_write_checkpoint(folder), random, _read_checkpoint)


def resealed_checkpoint_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield checkpoints with one changed file whose hash in the manifest fits again, as a forger would make it."""
    path = _write_checkpoint(folder)
    for case in _damaged(path, random, _read_checkpoint, without=(layout.MANIFEST,)):
        _seal(path)
        # No hash tells what was written; what is read must only be of the right types.
        yield case._replace(is_right=lambda _: True)


def hf_folder_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield exported folders with one damaged file, as launch/convert_from_hf.py and model.init_from read them."""
    checkpoint = _write_checkpoint(folder)
    out = folder / "exported"
    export_checkpoint(checkpoint, out)
    shutil.rmtree(checkpoint)
    return _damaged(out, random, _read_hf_folder)


def _damaged(
    folder: Path, random: Random, read: Callable[[Path], object], without: tuple[str, ...] = ()
) -> Iterator[Case]:
    """Damage one file at a time, and put it back before the next."""
    expected = read(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in without]
    while True:
        path = random.choice(files)
        data = path.read_bytes()
        what = damage_file(path, random)
        shown = path.read_bytes()[:300] if what == "other JSON" else b""
        describe = f"{path.relative_to(folder)}: {what} {shown!r}"
        yield Case(describe, lambda: read(folder), lambda result: result == expected, (str(folder), path.name))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(data)


@functools.cache
def _inputs() -> tempfile.TemporaryDirectory[str]:
    """A folder that all kinds share, until this process ends."""
    return tempfile.TemporaryDirectory(prefix="fuzz-inputs-")


@functools.cache
def _tokenizer() -> tuple[Path, Path]:
    """Train a tokenizer; returns its texts and its folder."""
    folder = Path(_inputs().name)
    jsonl = folder / "texts.jsonl"
    texts = [text for module in (argparse, decimal, random, statistics) for text in docstrings(_source(module))]
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer.main([f"--source={jsonl}", f"--out={folder / 'tokenizer'}", "--vocab_size=300"])
    return jsonl, folder / "tokenizer"


def _source(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)


def _write_shards(folder: Path) -> Path:
    texts, tokenizer = _tokenizer()
    out = folder / "shards"
    flags = ["--heldout=0.2", "--min_shards=2", "--chunk_tokens=500"]
    write_shards.main([f"--source={texts}", f"--tokenizer={tokenizer}", f"--out={out}", *flags])
    return out


def _write_checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder / "run", small_model(), _tokenizer()[1])


def _seal(folder: Path) -> None:
    names = [name for name in layout.files_of(folder) if (folder / name).is_file()]
    sizes = {name: ((folder / name).stat().st_size, hashing.file_sha256(folder / name)) for name in names}
    (folder / layout.MANIFEST).write_text(json.dumps(sizes))


def _read_shards(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in ("train", "heldout"):
        corpus = open_corpus([(str(folder), 1.0)], part)
        source = corpus.sources[0]
        chunks = [source.read_chunk(shard, i) for shard, s in enumerate(source.shards) for i in range(len(s.chunks))]
        found[f"{part} tokens"] = _digest([array for chunk in chunks for array in chunk])
        found[f"{part} splits"] = _digest(list(cut_into_splits(source, 8)))
        found[f"{part} median"] = repr(source.median_document_tokens)
    found["shares"] = _digest([corpus.token_shares])
    found["special ids"] = repr(sorted(source.tokenizer.special_ids.items()))
    found["tokenizer.json"] = hashlib.sha256(source.read_tokenizer_file()).hexdigest()
    found["tokenizer_config.json"] = repr(source.read_optional("tokenizer_config.json"))
    return found


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    if problem := layout.check_files(layout.find_checkpoint(folder)):
        raise ValueError(problem)
    model = read_checkpoint(folder)
    streams = folder / layout.STREAMS
    positions = positions_from_json(json.loads(streams.read_text()), str(streams)) if streams.exists() else None
    weights = {name: _digest([tensor.numpy()]) for name, tensor in model.weights.items()}
    return {"state": repr(model.state), "config": model.config.to_dict(), "weights": weights, "positions": positions}


def _read_hf_folder(folder: Path) -> dict[str, Any]:
    model = read_and_resize(folder)
    weights = {name: _digest([tensor.numpy()]) for name, tensor in model.weights.items()}
    return {"config": model.config.to_dict(), "weights": weights, "tokenizer": read_hf_tokenizer(folder).to_str()}


def _digest(arrays: list[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()
