"""The race's texts: token shards with one tokenizer, the rows of the baseline, and the held-out masked tokens."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from race.records import hash_of
from race.texts import prose

from megabert.data.masking import mask
from megabert.data.shards.source import Source, open_source

REPOSITORY = Path(__file__).resolve().parents[4]
NAMES = ("docstrings", "prose")
VOCABULARY = 8192
MAX_SEQ_LEN = 128
HELD_OUT_MASKED = 0.15
HELD_OUT_TOKENS = 65_536
HELD_OUT_SEED = 15


class HeldOutRow(NamedTuple):
    """input_ids: with [MASK] and random tokens; positions, labels: of the masked tokens."""

    input_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A text of the race."""

    name: str
    tokens: Path
    """folder of token shards, with a held-out part"""

    @cached_property
    def train(self) -> Source:
        return open_source(str(self.tokens))

    @cached_property
    def hash(self) -> str:
        """Of the training tokens, the tokenizer and the held-out tokens with their masks."""
        held = [[row.input_ids.tolist(), row.labels.tolist()] for row in self.held_out]
        return hash_of([self.train.fingerprint, self.train.tokenizer.fingerprint, held])

    @property
    def tokenizer_file(self) -> Path:
        return self.tokens / "tokenizer.json"

    @cached_property
    def held_out(self) -> list[HeldOutRow]:
        """Rows of at most MAX_SEQ_LEN tokens of held-out documents, of which 15 % of the tokens are masked."""
        tokenizer, rng, chosen, total = self.train.tokenizer, np.random.default_rng(HELD_OUT_SEED), [], 0
        for ids in windows(open_source(str(self.tokens), "heldout")):
            row = ids.astype(np.int64)
            masked = mask(
                row,
                ~tokenizer.is_special[row],
                HELD_OUT_MASKED,
                tokenizer.special_ids["mask"],
                tokenizer.ordinary_ids,
                rng,
            )
            chosen.append(HeldOutRow(row, masked.positions, masked.labels))
            total += len(row)
            if total >= HELD_OUT_TOKENS:
                break
        return chosen


def documents(source: Source) -> Iterator[np.ndarray]:
    """Yield the token ids of every document, without special tokens."""
    for shard in range(len(source.shards)):
        for chunk in range(len(source.shards[shard].chunks)):
            read = source.read_chunk(shard, chunk)
            yield from np.split(np.asarray(read.tokens), np.cumsum(read.lengths)[:-1])


def windows(source: Source) -> Iterator[np.ndarray]:
    """Yield rows with [CLS] and [SEP]: a document, or consecutive windows of a document that is longer than a row."""
    special = source.tokenizer.special_ids
    room = MAX_SEQ_LEN - 2
    for ids in documents(source):
        for begin in range(0, len(ids), room):
            yield np.concatenate([[special["cls"]], ids[begin : begin + room], [special["sep"]]])


def blocks(source: Source) -> np.ndarray:
    """Join all documents with their special tokens, and cut them into rows of MAX_SEQ_LEN, as run_mlm.py does."""
    special = source.tokenizer.special_ids
    joined = np.concatenate([np.concatenate([[special["cls"]], ids, [special["sep"]]]) for ids in documents(source)])
    return joined[: len(joined) // MAX_SEQ_LEN * MAX_SEQ_LEN].reshape(-1, MAX_SEQ_LEN)


def prepare(name: str, data: Path = REPOSITORY / "data") -> Corpus:
    """Make a corpus if it is missing. Raises prose.UnreachableError where the prose cannot be downloaded."""
    if name == "docstrings":
        tokens = data / "quickstart/tokens"
        if not (tokens / "manifest.json").is_file():
            run(["bash", "launch/quickstart/prepare.sh"])
        return Corpus(name, tokens)
    folder = data / "race/prose"
    tokens = folder / "tokens"
    if not (tokens / "manifest.json").is_file():
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
        prose.write_documents(folder / "packages", text)
        python = [sys.executable, "-m"]
        run([*python, "data_prep.train_tokenizer", f"--source={text}", f"--out={tokenizer}",
             f"--vocab-size={VOCABULARY}"])  # fmt: skip
        run([*python, "data_prep.write_shards", f"--source={text}", f"--tokenizer={tokenizer}", f"--out={tokens}",
             "--heldout=0.02"])  # fmt: skip
    return Corpus(name, tokens)


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}; see above.")
