"""Fine-tune a classifier or a regression on packed examples: no padding here either."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from megabert.convert.hf.reader import read_weights
from megabert.convert.hf.tokenizer import read_hf_tokenizer
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.task import Examples, Task
from megabert.kernels.resolve import has_fast_bf16, resolve
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

# Tokens of one bin: a step's examples are cut into as many as they need. On a CPU few enough for its cache.
BIN_TOKENS = {"cpu": 4096, "cuda": 32_768}


class Place(NamedTuple):
    """What a model runs on. ops: as run.ops of a recipe."""

    device: torch.device
    ops: Any = "auto"


class Encoded(NamedTuple):
    """ids: token ids of each example, specials included; types: 0 in the first text, 1 in the second, or None; labels: (n,)."""

    ids: list[list[int]]
    types: list[list[int]] | None
    labels: Tensor | None


class Trained(NamedTuple):
    """seconds of training alone; examples and tokens: how many it saw, repetitions counted; bf16: whether it multiplied in it."""

    seconds: float
    examples: int
    tokens: int
    bf16: bool


def load_tokenizer(folder: Path, max_seq_len: int) -> Tokenizer:
    """A folder's tokenizer, making [CLS] a [SEP] or [CLS] a [SEP] b [SEP] of at most so many tokens.

    The longer text of a pair loses tokens first. Raises ValueError if there is none, or if it lacks these tokens.
    """
    tokenizer = read_hf_tokenizer(folder)
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    numbers = {token: tokenizer.token_to_id(token) for token in (cls, sep)}
    for token, number in numbers.items():
        if number is None:
            raise ValueError(f"{folder}: its tokenizer has no {token}.")
    special: Any = list(numbers.items())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=special
    )
    tokenizer.enable_truncation(max_seq_len, strategy="longest_first")
    return tokenizer


def encode(examples: Examples, tokenizer: Tokenizer, two_types: bool) -> Encoded:
    """two_types: whether the model tells a pair's texts apart by their type."""
    second = examples.second
    texts: Any = examples.first if second is None else list(zip(examples.first, second, strict=True))
    encodings = tokenizer.encode_batch_fast(texts)
    labels = None if examples.labels is None else torch.tensor(examples.labels)
    types = [encoding.type_ids for encoding in encodings] if second is not None and two_types else None
    return Encoded([encoding.ids for encoding in encodings], types, labels)


def pack(encoded: Encoded, chosen: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Lay examples end to end: the model's inputs. ids [2 9 3], [2 3] -> input_ids (5,), cu_seqlens [0, 3, 5]."""
    parts = [encoded.ids[i] for i in chosen]
    lengths = np.array([len(part) for part in parts])
    types = None if encoded.types is None else [kind for i in chosen for kind in encoded.types[i]]
    return {
        "input_ids": torch.tensor([token for part in parts for token in part], device=device),
        "token_type_ids": None if types is None else torch.tensor(types, device=device),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device),
        "max_seqlen": int(lengths.max()),
    }


def cut_into_bins(encoded: Encoded, chosen: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """Cut examples, in their order, into bins of at most so many tokens; an example longer than that has its own."""
    lengths = np.array([len(encoded.ids[i]) for i in chosen])
    begin, filled = 0, 0
    for place, length in enumerate(lengths):
        if place > begin and filled + length > most_tokens:
            yield chosen[begin:place]
            begin, filled = place, 0
        filled += length
    yield chosen[begin:]


def build_model(
    folder: Path, task: Task, settings: Settings, place: Place, seed: int, pretrained: bool = True
) -> MegaBertForSequenceClassification:
    """A folder's encoder under a new head, drawn from the seed; or with pretrained False all from random weights.

    A pooler that the folder has comes along; its classifier does not. Raises ValueError if any of the encoder is missing.
    """
    config = MegaBertConfig.from_pretrained(folder, num_labels=task.num_labels, problem_type=None)
    config.classifier_pooling = settings.pooling
    if settings.dropout is not None:
        config.hidden_dropout_prob = config.classifier_dropout = settings.dropout
    if settings.attention_dropout is not None:
        config.attention_probs_dropout_prob = settings.attention_dropout
    torch.manual_seed(seed)
    model = MegaBertForSequenceClassification(config)
    if pretrained:
        weights = {name: tensor for name, tensor in read_weights(folder).items() if name.startswith("bert.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        lost = [name for name in missing if not name.startswith(("bert.pooler.", "classifier."))]
        if lost or unexpected:
            raise ValueError(
                f"{folder}: lacks {len(lost)} of the encoder's parameters and has {len(unexpected)} unknown ones, such as "
                f"{min([*lost, *unexpected])}."
            )
        if settings.rescale_embeddings:
            rescale_embeddings(model)
    set_ops(model, resolve(place.ops, place.device, config, uses_bf16(settings, place.device)))
    torch.nn.Module.to(model, place.device)
    return model


def uses_bf16(settings: Settings, device: torch.device) -> bool:
    """As pretraining does: where the device is fast at it."""
    return settings.precision == "auto" and has_fast_bf16(device)


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


def parameter_groups(model: torch.nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """With and without weight decay: norms and biases only if the protocol says so."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() > 1 or settings.decay_norms_and_biases]
    others = [p for p in parameters if not (p.dim() > 1 or settings.decay_norms_and_biases)]
    groups = [
        {"params": decayed, "weight_decay": settings.torch_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Linear from 0 to 1 over the warm-up, and to 0 at the last step's end. step: from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def finetune(
    model: MegaBertForSequenceClassification, train: Encoded, settings: Settings, place: Place, seed: int
) -> Trained:
    """Train in place, every epoch in a new order. A step is batch_size examples, in bins; its loss is their mean.

    Raises ValueError when the loss is no longer finite.
    """
    assert train.labels is not None, "training needs labels"
    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    device, bf16 = place.device, uses_bf16(settings, place.device)
    labels = train.labels.to(device)
    steps = settings.epochs * -(-len(train.ids) // settings.batch_size)
    warmup = max(1, round(settings.warmup * steps))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings), lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps, warmup))
    model.train()
    total = torch.zeros((), device=device)
    for epoch in range(settings.epochs):
        order = rng.permutation(len(train.ids))
        for begin in range(0, len(order), settings.batch_size):
            step = order[begin : begin + settings.batch_size]
            for chosen in cut_into_bins(train, step, BIN_TOKENS[device.type]):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    wanted = labels[torch.from_numpy(chosen).to(device)]
                    loss = model(**pack(train, chosen, device), labels=wanted).loss
                (loss * (len(chosen) / len(step))).backward()
                total += loss.detach()
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if not torch.isfinite(total):  # once per epoch: asking waits for the device
            raise ValueError(f"the loss was not finite in epoch {epoch + 1} of {settings.epochs}. Lower lr.")
    seconds = time.perf_counter() - began
    tokens = settings.epochs * sum(map(len, train.ids))
    return Trained(seconds, settings.epochs * len(train.ids), tokens, bf16)


@torch.no_grad()
def predict(model: MegaBertForSequenceClassification, encoded: Encoded, settings: Settings, place: Place) -> np.ndarray:
    """(n,) the number of each example's label; or for a regression the value."""
    model.eval()
    device = place.device
    # By length: neighbours of one length share an attention call on a CPU. Every example counts once, in whatever order.
    order = np.argsort([len(ids) for ids in encoded.ids], kind="stable")
    parts = []
    for chosen in cut_into_bins(encoded, order, BIN_TOKENS[device.type]):
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(settings, device)):
            logits = model(**pack(encoded, chosen, device)).logits
        parts.append(logits.float().squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(dim=-1))
    sorted_predictions = torch.cat(parts).cpu().numpy()
    predictions = np.empty_like(sorted_predictions)
    predictions[order] = sorted_predictions
    return predictions
