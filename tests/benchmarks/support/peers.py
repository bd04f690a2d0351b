"""Other loaders for comparison with ours, each set up for speed.

All get the pieces that our loader would make: cut to the cap, with [CLS] and [SEP], as arrays of ids. One DataLoader
worker reads, packs or collates, and masks; the tokens that it delivers are counted without padding.

Three are what a user who needs speed would write, with masking in numpy: blocks of a memory-mapped file of tokens,
pieces in memory packed greedily, and the same packing of mosaicml-streaming's samples. Two have transformers' collator.
"""

import importlib
import shutil
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[3] / ".peers"
PACKAGES = (
    "mosaicml-streaming==0.13.0",
    "Brotli==1.2.1",
    "python-snappy==0.7.3",
    "cramjam==2.14.0",
    "zstd==1.5.7.2",
    "catalogue==2.0.10",
)
# Sequences; larger batches are not faster per token, and have more padding.
BATCH = 32
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def install() -> None:
    """Install mosaicml-streaming into a folder of its own, without its requirements: they are older than ours."""
    if not FOLDER.is_dir():
        print(f"installing {PACKAGES[0]} into {FOLDER.name}/, for the comparison only", flush=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--target"]
        subprocess.run([*command, str(FOLDER), *PACKAGES], check=True)


def import_streaming() -> types.ModuleType:
    """Import mosaicml-streaming with an empty torchvision, which only its image datasets use."""
    install()
    sys.path.append(str(FOLDER))
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision.datasets"].VisionDataset = object  # pyrefly: ignore[missing-attribute]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # pyrefly: ignore[missing-attribute]
    return importlib.import_module("streaming")


def collator(vocab_size: int) -> DataCollatorForLanguageModeling:
    """Return transformers' masking collator, for a tokenizer of special tokens and numbers."""
    vocabulary = {token: number for number, token in enumerate(SPECIALS)}
    vocabulary |= {str(number): number for number in range(len(SPECIALS), vocab_size)}
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "[UNK]")), **names)
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)


def real_tokens(loader: DataLoader) -> Iterator[int]:
    """Yield the tokens of each batch without padding, over endless passes."""
    while True:
        for batch in loader:
            yield int(batch["attention_mask"].sum())


def huggingface_loader(pieces: list[np.ndarray], vocab_size: int, folder: Path) -> DataLoader:
    """Open a loader of datasets: memory-mapped Arrow files, shuffled."""
    import datasets

    if not folder.is_dir():
        datasets.Dataset.from_dict({"input_ids": [piece.tolist() for piece in pieces]}).save_to_disk(str(folder))
    dataset = datasets.load_from_disk(str(folder))
    return DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=1, collate_fn=collator(vocab_size), prefetch_factor=4
    )


def streaming_loader(pieces: list[np.ndarray], vocab_size: int, folder: Path) -> DataLoader:
    """Open a loader of mosaicml-streaming: local MDS shards, shuffled, samples as arrays."""
    streaming = import_streaming()
    if not folder.is_dir():
        with streaming.MDSWriter(out=str(folder), columns={"input_ids": "ndarray:uint16"}) as writer:
            for piece in pieces:
                writer.write({"input_ids": piece.astype(np.uint16)})
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    collate = collator(vocab_size)

    def as_lists(samples: list[dict]) -> dict:
        return collate([{"input_ids": sample["input_ids"].astype(np.int64)} for sample in samples])

    return DataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=as_lists, prefetch_factor=4)


def masked(ids: np.ndarray, rng: np.random.Generator, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask 30 % of the tokens as BERT does. Returns ids and labels, (T,) int64."""
    chosen = (rng.random(len(ids)) < 0.3) & (ids >= len(SPECIALS))
    labels = np.where(chosen, ids, -100)
    kind = rng.random(len(ids))
    ids = np.where(chosen & (kind < 0.8), SPECIALS.index("[MASK]"), ids)
    others = rng.integers(len(SPECIALS), vocab_size, len(ids))
    return torch.from_numpy(np.where(chosen & (kind >= 0.9), others, ids)), torch.from_numpy(labels)


class MemoryMapped(IterableDataset):
    """Random blocks of T tokens of one memory-mapped file of uint16."""

    def __init__(self, pieces: list[np.ndarray], vocab_size: int, bin_tokens: int, file: Path):
        self.vocab_size, self.bin_tokens, self.file = vocab_size, bin_tokens, file
        if not file.exists():
            np.concatenate(pieces).astype(np.uint16).tofile(file)

    def __iter__(self) -> Iterator[tuple]:
        tokens, rng = np.memmap(self.file, dtype=np.uint16, mode="r"), np.random.default_rng(0)
        while True:
            begin = rng.integers(len(tokens) - self.bin_tokens)
            yield (
                *masked(tokens[begin : begin + self.bin_tokens].astype(np.int64), rng, self.vocab_size),
                self.bin_tokens,
            )


class Greedy(IterableDataset):
    """Shuffled pieces, packed greedily into bins of T tokens with their boundaries."""

    def __init__(self, pieces: Iterable[np.ndarray] | None, vocab_size: int, bin_tokens: int):
        self.pieces, self.vocab_size, self.bin_tokens = pieces, vocab_size, bin_tokens

    def samples(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield one pass over the pieces."""
        assert isinstance(self.pieces, list)
        return (self.pieces[index] for index in rng.permutation(len(self.pieces)))

    def __iter__(self) -> Iterator[tuple]:
        rng, held, total = np.random.default_rng(0), [], 0
        while True:
            for piece in self.samples(rng):
                if total + len(piece) > self.bin_tokens:
                    cu_seqlens = torch.from_numpy(np.cumsum([0, *map(len, held)]))
                    yield (*masked(np.concatenate(held), rng, self.vocab_size), total, cu_seqlens)
                    held, total = [], 0
                held.append(piece)
                total += len(piece)


class GreedyStreaming(Greedy):
    """The same packing of mosaicml-streaming's samples."""

    def __init__(self, folder: Path, vocab_size: int, bin_tokens: int):
        super().__init__(None, vocab_size, bin_tokens)
        # Two data sets may not share a folder.
        copy = folder.with_name("mds-greedy")
        if not copy.is_dir():
            shutil.copytree(folder, copy)
        self.dataset = import_streaming().StreamingDataset(local=str(copy), shuffle=True, batch_size=BATCH)

    def samples(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield one pass over the samples."""
        return (sample["input_ids"].astype(np.int64) for sample in self.dataset)


def packed_tokens(dataset: IterableDataset) -> Iterator[int]:
    """Yield the tokens of each bin, which one worker makes."""
    return (int(bin_[2]) for bin_ in DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))
