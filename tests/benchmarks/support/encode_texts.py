# ruff: noqa: E402 (the line that forbids megabert comes before imports that might import it)
"""Compare sentence embeddings per second of an exported folder with transformers' BertModel.

    python tests/benchmarks/support/encode_texts.py FOLDER TEXTS BATCH ROUNDS

FOLDER is loaded where megabert cannot be imported. Both models have the same size and are in fp32, as transformers
loads them. They encode the same batches in turns: texts in their given order, padded to the longest of their batch.
Prints one line of JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.modules["megabert"] = None  # type: ignore[assignment] # makes every import of it fail

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

# Tokens.
MAX_LENGTH = 512


def mean_of(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of each text's tokens, as sentence-transformers does by default: (B, S, E), (B, S) -> (B, E)."""
    return (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def seconds(model: torch.nn.Module, inputs: dict) -> float:
    start = time.perf_counter()
    mean_of(model(**inputs).last_hidden_state, inputs["attention_mask"])
    return time.perf_counter() - start


def main(folder: str, texts: str, size: int, rounds: int) -> dict:
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer is not None, f"{folder}: has no tokenizer"
    ours = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    config = ours.config
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    theirs = BertModel(BertConfig(**{name: getattr(config, name) for name in sizes})).eval()
    all_texts = json.loads(Path(texts).read_text())
    batches = [all_texts[i : i + size] for i in range(0, size * rounds, size)]
    encoded = tokenizer(["a text"] * 2, return_tensors="pt")
    warmup = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    for model in (ours, theirs):
        seconds(model, warmup)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    lengths: list[int] = []
    for number, batch in enumerate(batches):
        encoded = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        lengths += inputs["attention_mask"].sum(dim=1).tolist()
        models = [("ours", ours), ("theirs", theirs)]
        for name, model in models if number % 2 else models[::-1]:
            times[name].append(seconds(model, inputs))
    return {
        "ours": len(lengths) / sum(times["ours"]),
        "theirs": len(lengths) / sum(times["theirs"]),
        "ratio": statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True)),
        "mean_length": statistics.mean(lengths),
        "median_length": statistics.median(lengths),
        "longest": max(lengths),
        "texts": len(lengths),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))) + "\n")
