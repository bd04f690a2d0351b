"""Write folders as published models have them: transformers' own class with random weights, and its own tokenizer."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
# What the class of each kind needs beside SIZES. RoBERTa's tables of positions have rows that no token uses.
ROBERTA = {"max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
SETTINGS: dict[str, dict[str, Any]] = {
    "Bert": {"max_position_embeddings": 64},
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "Camembert": ROBERTA,
    "DistilBert": {"max_position_embeddings": 64, "hidden_dim": 48},
    "Electra": {"max_position_embeddings": 64, "embedding_size": 32},
    "ModernBert": {"local_attention": 8, "max_position_embeddings": 64},
    "Gte": {"max_position_embeddings": 64, "type_vocab_size": 1},
}


def write_published_folder(folder: Path, kind: str, texts: list[str], head: str = "ForMaskedLM") -> torch.nn.Module:
    """Write the class `kind` + `head` of transformers and its tokenizer, trained on the texts. Returns the model."""
    tokenizer = make_tokenizer(kind, texts)
    sizes = {name: size for name, size in SIZES.items() if kind != "DistilBert" or name != "intermediate_size"}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep")}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes, **SETTINGS[kind], **ids)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_tokenizer(kind: str, texts: list[str], vocab_size: int = 800) -> PreTrainedTokenizerBase:
    """Make the tokenizer that the published models of a kind have, with special tokens of the ids that they have."""
    lines = [line for text in texts for line in text.splitlines()]
    if kind in ("XLMRoberta", "Camembert"):
        pieces = _train_unigram(lines, vocab_size)
        own = {"XLMRoberta": ["<s>", "<pad>", "</s>", "<unk>"]}
        own["Camembert"] = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
        vocabulary = [*((piece, 0.0) for piece in own[kind]), *pieces, ("<mask>", 0.0)]
        return getattr(transformers, f"{kind}Tokenizer")(vocab=vocabulary)
    if kind == "Roberta":
        ids, merges = _train_bytes(lines, vocab_size, ["<s>", "<pad>", "</s>", "<unk>"])
        return transformers.RobertaTokenizer(vocab=ids | {"<mask>": len(ids)}, merges=merges)
    special = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    words = sorted({word for line in lines for word in line.lower().split() if word.isascii() and word.isalpha()})
    letters = [piece for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,'" for piece in (letter, f"##{letter}")]
    pieces = list(dict.fromkeys([*special.values(), *letters, *words]))[:vocab_size]
    return transformers.BertTokenizer(vocab=dict(zip(pieces, count(), strict=False)))


def _train_bytes(lines: list[str], vocab_size: int, special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def _train_unigram(lines: list[str], vocab_size: int) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocabulary if piece != "<unk>"]
