"""The loaders that ours is measured against, each in the setup that its users would call fast.

Both get the pieces that ours would make: cut to the cap, with [CLS] and [SEP], as pre-tokenised arrays. One DataLoader
worker reads, collates and masks; the tokens that it delivers are counted without padding.
"""

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[2] / ".peers"
PACKAGES = (
    "mosaicml-streaming==0.13.0",
    "Brotli==1.2.1",
    "python-snappy==0.7.3",
    "cramjam==2.14.0",
    "zstd==1.5.7.2",
    "catalogue==2.0.10",
)
BATCH = 32  # sequences; larger batches are no faster per token, and pad more
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def install() -> None:
    """Fetch mosaicml-streaming into a folder of its own: its requirements are older than ours, and mostly for clouds."""
    if not FOLDER.is_dir():
        print(f"fetching {PACKAGES[0]} into {FOLDER.name}/, for comparison only", flush=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--target"]
        subprocess.run([*command, str(FOLDER), *PACKAGES], check=True)


def import_streaming() -> types.ModuleType:
    """mosaicml-streaming; an empty torchvision stands in for the real one, which only its image datasets use."""
    install()
    sys.path.append(str(FOLDER))
    if importlib.util.find_spec("torchvision") is None:
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
    """transformers' masking, on a tokenizer that is no more than its special tokens."""
    vocabulary = {token: number for number, token in enumerate(SPECIALS)}
    vocabulary |= {str(number): number for number in range(len(SPECIALS), vocab_size)}
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "[UNK]")), **names)
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)


def real_tokens(loader: DataLoader) -> Iterator[int]:
    """Tokens of each batch, padding not counted, pass after pass."""
    while True:
        for batch in loader:
            yield int(batch["attention_mask"].sum())


def huggingface_loader(pieces: list[np.ndarray], vocab_size: int, folder: Path) -> DataLoader:
    """datasets: Arrow on disk, memory-mapped, shuffled."""
    import datasets

    if not folder.is_dir():
        datasets.Dataset.from_dict({"input_ids": [piece.tolist() for piece in pieces]}).save_to_disk(str(folder))
    dataset = datasets.load_from_disk(str(folder))
    return DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=1, collate_fn=collator(vocab_size), prefetch_factor=4
    )


def streaming_loader(pieces: list[np.ndarray], vocab_size: int, folder: Path) -> DataLoader:
    """mosaicml-streaming: local MDS shards, shuffled, samples as arrays."""
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
