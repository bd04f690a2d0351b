"""Fine-tune a classifier or a regression on packed examples, without padding."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from megabert.convert.hf.reader import read_weights
from megabert.convert.hf.tokenizer import read_hf_tokenizer
from megabert.data.shards.tokenizer import special_tokens
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.task import Examples, Task
from megabert.kernels.devices import has_fast_bf16
from megabert.kernels.resolve import resolve
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForSequenceClassification
from megabert.optim.lr_schedule import warmup_and_decay
from megabert.optim.parameter_groups import decay_groups

# Most tokens of one bin: a step's examples are split into bins of this size. On a CPU, small enough for its cache.
BIN_TOKENS = {"cpu": 4096, "cuda": 32_768}


class Backend(NamedTuple):
    """What a model computes with. ops: the implementation of its operations, as run.ops of a recipe."""

    device: torch.device
    ops: Literal["auto", "torch", "fused"] = "auto"


class EncodedExamples(NamedTuple):
    """Tokenized examples.

    input_ids: token ids of each example, with special tokens; token_type_ids: 0 in the first text and 1 in the second,
    or None; labels: (n,).
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: Tensor | None


class TrainingStats(NamedTuple):
    """seconds: of training alone; examples, tokens: seen in all epochs; bf16: whether matrices multiplied in it."""

    seconds: float
    examples: int
    tokens: int
    bf16: bool


def load_tokenizer(folder: Path, max_seq_len: int) -> Tokenizer:
    """Load a folder's tokenizer, which encodes to [CLS] a [SEP] or [CLS] a [SEP] b [SEP] of at most max_seq_len tokens.

    Between the texts of a pair are two [SEP] if the folder's tokenizer puts two there, as RoBERTa's. The longer text is
    truncated first. Raises ValueError without a tokenizer, or without these special
    tokens.
    """
    tokenizer = read_hf_tokenizer(folder)
    cls, sep = (special_tokens(tokenizer)[role] for role in ("cls", "sep"))
    token_ids = {token: tokenizer.token_to_id(token) for token in (cls, sep)}
    for token, token_id in token_ids.items():
        if token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no {token}.")
    special: Any = list(token_ids.items())
    two = tokenizer.encode("", "").ids == [token_ids[cls], *[token_ids[sep]] * 3]
    between = f"{sep} {sep}" if two else sep
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {between} $B:1 {sep}:1", special_tokens=special
    )
    tokenizer.enable_truncation(max_seq_len, strategy="longest_first")
    return tokenizer


def encode(examples: Examples, tokenizer: Tokenizer, use_token_types: bool) -> EncodedExamples:
    """Tokenize examples. use_token_types: whether the model has token type embeddings for the two texts of a pair."""
    second = examples.second
    texts: Any = examples.first if second is None else list(zip(examples.first, second, strict=True))
    encodings = tokenizer.encode_batch_fast(texts)
    labels = None if examples.labels is None else torch.tensor(examples.labels)
    types = [encoding.type_ids for encoding in encodings] if second is not None and use_token_types else None
    return EncodedExamples([encoding.ids for encoding in encodings], types, labels)


def pack(encoded: EncodedExamples, indices: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Return the model's inputs for examples laid end to end.

    [2 9 3], [2 3] -> input_ids [2 9 3 2 3], cu_seqlens [0, 3, 5].
    """
    sequences = [encoded.input_ids[i] for i in indices]
    lengths = np.array([len(sequence) for sequence in sequences])
    types = None
    if encoded.token_type_ids is not None:
        types = torch.tensor([kind for i in indices for kind in encoded.token_type_ids[i]], device=device)
    return {
        "input_ids": torch.tensor([token for sequence in sequences for token in sequence], device=device),
        "token_type_ids": types,
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device),
        "max_seqlen": int(lengths.max()),
    }


def split_into_bins(encoded: EncodedExamples, indices: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Split examples, in order, into bins of at most max_tokens; a longer example has a bin of its own."""
    lengths = np.array([len(encoded.input_ids[i]) for i in indices])
    begin, filled = 0, 0
    for end, length in enumerate(lengths):
        if end > begin and filled + length > max_tokens:
            yield indices[begin:end]
            begin, filled = end, 0
        filled += length
    yield indices[begin:]


def build_model(
    folder: Path, task: Task, settings: Settings, backend: Backend, seed: int, pretrained: bool = True
) -> MegaBertForSequenceClassification:
    """Build a folder's encoder with a new classifier, initialized from the seed.

    pretrained: load the folder's weights; otherwise all weights are new. A pooler is loaded, a classifier is not.
    Raises ValueError if a parameter of the encoder is missing.
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
        used = ("bert.", "transform." if config.has_transform_head else "pre_classifier.")
        weights = {name: t for name, t in read_weights(folder).items() if name.startswith(used)}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.startswith(("pre_classifier.", "classifier."))]
        unexpected = [name for name in unexpected if not name.startswith("bert.pooler.")]
        if missing or unexpected:
            raise ValueError(
                f"{folder}: lacks {len(missing)} of the encoder's parameters and has {len(unexpected)} unknown ones, "
                f"such as {min([*missing, *unexpected])}."
            )
        if settings.rescale_embeddings:
            rescale_embeddings(model)
    set_ops(model, resolve(backend.ops, backend.device, config, uses_bf16(settings, backend.device)))
    torch.nn.Module.to(model, backend.device)
    return model


def uses_bf16(settings: Settings, device: torch.device) -> bool:
    """Return whether to multiply in bf16: as in pretraining, where the device is fast at it."""
    return settings.precision == "auto" and has_fast_bf16(device)


@torch.no_grad()
def rescale_embeddings(model: MegaBertForSequenceClassification) -> None:
    """Scale all embedding tables by one factor that gives the word embeddings their initial standard deviation.

    The LayerNorm that follows removes the scale, so the model's outputs stay the same. But the size of AdamW's updates
    does not depend on the weights': embeddings that pretraining has made four times as long turn four times as slowly.
    """
    tables = [m.weight for m in model.bert.embeddings.modules() if isinstance(m, torch.nn.Embedding)]
    factor = model.config.initializer_range / model.bert.embeddings.word_embeddings.weight.std()
    for table in tables:
        table.mul_(factor)


def finetune(
    model: MegaBertForSequenceClassification, train: EncodedExamples, settings: Settings, backend: Backend, seed: int
) -> TrainingStats:
    """Train the model in place, each epoch in a new order. The loss of a step is the mean over batch_size examples.

    Raises ValueError when the loss is no longer finite.
    """
    assert train.labels is not None, "the examples to train on have no labels"
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    device, bf16 = backend.device, uses_bf16(settings, backend.device)
    labels = train.labels.to(device)
    steps = settings.epochs * -(-len(train.input_ids) // settings.batch_size)
    warmup = max(1, round(settings.warmup * steps))
    groups = decay_groups(model.parameters(), settings.torch_decay, settings.decay_norms_and_biases)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_and_decay(step, steps, warmup))
    model.train()
    total = torch.zeros((), device=device)
    for epoch in range(settings.epochs):
        order = rng.permutation(len(train.input_ids))
        for begin in range(0, len(order), settings.batch_size):
            batch = order[begin : begin + settings.batch_size]
            for indices in split_into_bins(train, batch, BIN_TOKENS[device.type]):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    bin_labels = labels[torch.from_numpy(indices).to(device)]
                    loss = model(**pack(train, indices, device), labels=bin_labels).loss
                (loss * (len(indices) / len(batch))).backward()
                total += loss.detach()
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        # Reading the total waits for the device, so it is done only once per epoch.
        if not torch.isfinite(total):
            raise ValueError(f"the loss was not finite in epoch {epoch + 1} of {settings.epochs}. Lower lr.")
    seconds = time.perf_counter() - start
    tokens = settings.epochs * sum(map(len, train.input_ids))
    return TrainingStats(seconds, settings.epochs * len(train.input_ids), tokens, bf16)


@torch.no_grad()
def predict(
    model: MegaBertForSequenceClassification, encoded: EncodedExamples, settings: Settings, backend: Backend
) -> np.ndarray:
    """Return (n,) predictions: indices of labels, or values of a regression."""
    model.eval()
    device = backend.device
    # Sorted by length, because examples of one length share an attention call on a CPU.
    order = np.argsort([len(sequence) for sequence in encoded.input_ids], kind="stable")
    parts = []
    for indices in split_into_bins(encoded, order, BIN_TOKENS[device.type]):
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(settings, device)):
            logits = model(**pack(encoded, indices, device)).logits
        parts.append(logits.float().squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(dim=-1))
    sorted_predictions = torch.cat(parts).cpu().numpy()
    predictions = np.empty_like(sorted_predictions)
    predictions[order] = sorted_predictions
    return predictions
