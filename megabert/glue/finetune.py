"""Fine-tune a classifier on packed examples: no padding here either."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from megabert.data.manifest import TOKENIZER
from megabert.glue.tasks import Examples, Task
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForSequenceClassification


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How to fine-tune: MosaicBERT's schedule (linear, 6 % warm-up, to 0)."""

    epochs: int = 3
    """passes over the training examples"""
    batch_size: int = 32
    """examples per step"""
    lr: float = 5e-5
    """peak learning rate"""
    weight_decay: float = 0.01
    """torch's convention"""
    warmup: float = 0.06
    """share of the steps that warms up"""
    max_seq_len: int = 128
    """longer examples are truncated, tokens"""
    dropout: float = 0.1
    """on hidden states and before the classifier"""
    pooling: Literal["cls", "mean"] = "cls"
    """what the classifier sees: the first token or the mean of all; the mean suits encoders trained only briefly"""
    rescale_embeddings: bool = False
    """bring the embeddings back to their initial norm, which changes no output, so that they turn as fast as fresh ones"""
    seed: int = 19
    """seed of the head, the order and the dropout"""


class Encoded(NamedTuple):
    """ids: token ids of each example, specials included; labels: (n,)."""

    ids: list[list[int]]
    labels: Tensor


class Score(NamedTuple):
    value: float
    seconds: float


def model_fingerprint(folder: Path) -> str:
    """The sha256 of an exported folder's weights. Raises ValueError if there are none."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder written by launch/convert_to_hf.py.")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode(examples: Examples, tokenizer: Tokenizer) -> Encoded:
    encodings = tokenizer.encode_batch_fast(examples.texts)
    return Encoded([encoding.ids for encoding in encodings], torch.tensor(examples.labels))


def load_tokenizer(folder: Path, max_seq_len: int) -> Tokenizer:
    """The tokenizer of an exported folder, truncating. Raises ValueError if there is none."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder written by launch/convert_to_hf.py.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_seq_len)
    return tokenizer


def pack(encoded: Encoded, chosen: np.ndarray) -> tuple[dict, Tensor]:
    """Lay examples end to end. Returns the model's inputs and the labels."""
    parts = [encoded.ids[i] for i in chosen]
    lengths = np.array([len(part) for part in parts])
    inputs = {
        "input_ids": torch.tensor([token for part in parts for token in part]),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }
    return inputs, encoded.labels[torch.from_numpy(chosen)]


def build_classifier(
    folder: Path, task: Task, config: FinetuneConfig, pretrained: bool
) -> MegaBertForSequenceClassification:
    """The exported encoder with a new head; or with pretrained False the same architecture from random weights."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; expected a folder written by launch/convert_to_hf.py.")
    if (kind := json.loads((folder / "config.json").read_text()).get("model_type")) != MegaBertConfig.model_type:
        raise ValueError(f"{folder}: is a {kind} model. Make it one of ours with launch/convert_from_hf.py.")
    settings = MegaBertConfig.from_pretrained(
        folder,
        num_labels=task.num_labels,
        hidden_dropout_prob=config.dropout,
        classifier_dropout=config.dropout,
        classifier_pooling=config.pooling,
    )
    torch.manual_seed(config.seed)
    if not pretrained:
        return MegaBertForSequenceClassification(settings)
    loaded: Any = MegaBertForSequenceClassification.from_pretrained(folder, config=settings, output_loading_info=True)
    model, info = loaded
    _check_loaded(info, settings, folder)
    if config.rescale_embeddings:
        rescale_embeddings(model)
    return model


@torch.no_grad()
def rescale_embeddings(model: MegaBertForSequenceClassification) -> None:
    """Scale all embedding tables by one factor, so that the words' have their initial standard deviation.

    The LayerNorm that follows makes only directions matter, so the model stays the same function. But Adam's steps are
    absolute: embeddings that pretraining has made four times as long turn four times as slowly.
    """
    tables = [m.weight for m in model.bert.embeddings.modules() if isinstance(m, torch.nn.Embedding)]
    factor = model.config.initializer_range / model.bert.embeddings.word_embeddings.weight.std()
    for table in tables:
        table.mul_(factor)


def _check_loaded(info: dict, settings: PretrainedConfig, folder: Path) -> None:
    """Only the new head may be missing. Raises ValueError if any of the encoder is."""
    missing = [name for name in info["missing_keys"] if not name.startswith(("classifier.", "bert.pooler."))]
    if missing:
        raise ValueError(f"{folder}: lacks {len(missing)} of the encoder's parameters, such as {min(missing)}.")


def finetune(model: MegaBertForSequenceClassification, train: Encoded, config: FinetuneConfig) -> float:
    """Train in place on shuffled batches. Returns the seconds it took."""
    began = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    steps = config.epochs * -(-len(train.ids) // config.batch_size)
    warmup = max(1, round(config.warmup * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for _ in range(config.epochs):
        order = rng.permutation(len(train.ids))
        for begin in range(0, len(order), config.batch_size):
            inputs, labels = pack(train, order[begin : begin + config.batch_size])
            model(**inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return time.perf_counter() - began


@torch.no_grad()
def predict(model: MegaBertForSequenceClassification, examples: Encoded, batch_size: int = 128) -> np.ndarray:
    """The predicted label of each example."""
    model.eval()
    predictions = []
    for begin in range(0, len(examples.ids), batch_size):
        inputs, _ = pack(examples, np.arange(begin, min(begin + batch_size, len(examples.ids))))
        predictions.append(model(**inputs).logits.argmax(dim=-1))
    return torch.cat(predictions).numpy()


def run(folder: Path, task: Task, train: Examples, test: Examples, config: FinetuneConfig, pretrained: bool) -> Score:
    """Fine-tune on train, score on test."""
    tokenizer = load_tokenizer(folder, config.max_seq_len)
    model = build_classifier(folder, task, config, pretrained)
    seconds = finetune(model, encode(train, tokenizer), config)
    predictions = predict(model, encode(test, tokenizer))
    return Score(float((predictions == np.array(test.labels)).mean()), seconds)
