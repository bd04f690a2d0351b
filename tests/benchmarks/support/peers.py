"""Other loaders for comparison with ours, each set up for speed.

Both get the pieces that our loader would make: cut to the cap, with [CLS] and [SEP], as arrays of ids. One DataLoader
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

FOLDER = Path(__file__).resolve().parents[3] / ".peers"
PACKAGES = (
    "mosaicml-streaming==0.13.0",
    "Brotli==1.2.1",
    "python-snappy==0.7.3",
    "cramjam==2.14.0",
    "zstd==1.5.7.2",
    "catalogue==2.0.10",
)
BATCH = 32  # sequences; larger batches are not faster per token, and have more padding
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
