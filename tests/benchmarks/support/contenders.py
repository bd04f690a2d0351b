"""The models that bench_train.py compares, and one optimizer step of each on real tokens.

All of a row have the same layers, width, heads and FFN, bf16 autocast, torch's fused AdamW, 30 % masking, and their own
default dropout: 0.1 on hidden states; BERT also 0.1 on attention weights; ModernBERT none. With dropout on attention
weights, PyTorch's attention on a CPU does not use its fused kernel, so hf_bert is also measured without it.

In the rows modernbert_* MegaBERT trains ModernBERT's architecture itself: windows of 128 tokens, whole documents in
every third layer. transformers 5.23 has no form of it without padding on a CPU: only flash-attn reads packed rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from megabert.kernels.resolve import resolve
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.telemetry.flops import step_flops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Factor of tokens and rows on a GPU, which a few thousand tokens do not fill.
GPU_TIMES = 8
VOCAB = 30_528
MASKED = 0.3
# Lower ids are BERT's special and unused ones.
LOWEST_ID = 1000


class Row(NamedTuple):
    """One size of model and one cap on documents.

    tokens: of a bin of MegaBERT; rows: of a padded batch of the others. family: MegaBERT's architecture, mosaicbert or
    modernbert. log_length: mean of the logarithm of a document's tokens; 5.5 is that of web pages.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    cap: int
    tokens: int
    rows: int
    family: str = "mosaicbert"
    log_length: float = 5.5
    vocab: int = VOCAB
    dropout: float = 0.1


ROWS = {
    "quickstart": Row(3, 160, 5, 384, cap=128, tokens=1024, rows=8, vocab=8192, dropout=0.0),
    "mini_128": Row(4, 256, 4, 1024, cap=128, tokens=4096, rows=32),
    "mini_512": Row(4, 256, 4, 1024, cap=512, tokens=4096, rows=16),
    "small_512": Row(6, 512, 8, 2048, cap=512, tokens=4096, rows=16),
    "base_128": Row(12, 768, 12, 3072, cap=128, tokens=8192, rows=32),
}
for size in ("mini_512", "small_512", "base_128"):
    ROWS[f"modernbert_{size}"] = ROWS[size]._replace(family="modernbert")
ROWS["modernbert_small_2048"] = ROWS["modernbert_small_512"]._replace(cap=2048, tokens=8192, rows=8, log_length=6.5)


if DEVICE.type == "cuda":
    ROWS = {name: row._replace(tokens=GPU_TIMES * row.tokens, rows=GPU_TIMES * row.rows) for name, row in ROWS.items()}


class Contender(NamedTuple):
    """A model and its optimizer.

    compute_loss(inputs) returns the mean over masked tokens. draw(rng) returns a step's batches and the lengths of its
    documents. architecture: MegaBERT's configuration of the same architecture, for the FLOPs that it needs. compiles:
    the first step calls a compiler.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute_loss: Callable[[dict], Tensor]
    draw: Callable[[np.random.Generator], tuple[list[dict], list[int]]]
    architecture: MegaBertConfig
    compiles: bool = False

    def step(self, batches: list[dict]) -> None:
        """Take one optimizer step."""
        for batch in batches:
            inputs = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in batch.items()}
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = self.compute_loss(inputs)
            (loss / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def document_lengths(rng: np.random.Generator, row: Row) -> Iterator[int]:
    """Draw from Lognormal(row.log_length, 1.0), cut at the cap; at least [CLS], a token, [SEP]."""
    while True:
        yield int(np.clip(rng.lognormal(row.log_length, 1.0), 3, row.cap))


def draw_packed(rng: np.random.Generator, row: Row) -> tuple[list[dict], list[int]]:
    """Draw one bin of exactly row.tokens real tokens; its last document is cut to fit."""
    lengths: list[int] = []
    for length in document_lengths(rng, row):
        lengths.append(min(length, row.tokens - sum(lengths)))
        if sum(lengths) == row.tokens:
            break
    ids = torch.from_numpy(rng.integers(LOWEST_ID, row.vocab, row.tokens))
    masked = np.sort(rng.choice(row.tokens, round(MASKED * row.tokens), replace=False))
    positions = torch.from_numpy(masked.astype(np.int32))
    bin_ = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": row.cap,
        "masked_positions": positions,
        "masked_labels": ids[positions.long()].int(),
    }
    return [bin_], lengths


def draw_padded(rng: np.random.Generator, row: Row) -> tuple[list[dict], list[int]]:
    """Draw rows padded to the longest of each batch, in as many batches as come nearest to row.tokens real tokens."""
    batches, drawn = [], []
    source = document_lengths(rng, row)
    while not batches or sum(drawn) * (len(batches) + 0.5) / len(batches) < row.tokens:
        lengths = [next(source) for _ in range(row.rows)]
        ids = torch.from_numpy(rng.integers(LOWEST_ID, row.vocab, (row.rows, max(lengths))))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        hidden = torch.from_numpy(rng.random(ids.shape) < MASKED) & mask.bool()
        labels = torch.where(hidden, ids, -100)
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
        drawn += lengths
    return batches, drawn


def _contender(
    name: str, model: nn.Module, compute_loss: Callable, draw: Callable, architecture: MegaBertConfig
) -> Contender:
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    return Contender(name, model.train(), optimizer, compute_loss, draw, architecture)


def architecture_of(row: Row, family: str) -> MegaBertConfig:
    """Return MegaBERT's configuration of mosaicbert, bert or modernbert in a row's size."""
    families: dict[str, dict[str, Any]] = {
        "mosaicbert": {},
        "bert": {"position": "learned", "ffn": "gelu", "attention_probs_dropout_prob": 0.1},
        "modernbert": {
            "position": "rope", "rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "global_attention_every": 3,
            "local_attention_window": 128, "norm_position": "pre", "bias": False, "norm_bias": False,
            "type_vocab_size": 0, "layer_norm_dtype": "float32",
        },
    }  # fmt: skip
    return MegaBertConfig(
        vocab_size=row.vocab,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        max_position_embeddings=max(512, row.cap),
        hidden_dropout_prob=0.0 if family == "modernbert" else row.dropout,
        **families[family],
    )


def ours(name: str, row: Row, checkpoint_every: int = 0) -> Contender:
    """Build the model that a name begins with: "mosaicbert", "bert" or "modernbert", with the ops of run.ops auto."""
    config = architecture_of(row, name.split(",")[0])
    model = MegaBertForMaskedLM(config)
    set_ops(model, resolve("auto", DEVICE, config, bf16=True))
    model.bert.encoder.checkpoint_every = checkpoint_every

    def compute_loss(inputs: dict) -> Tensor:
        output = model(**inputs)
        return output.loss_sum / output.num_targets

    contender = _contender(name, model, compute_loss, lambda rng: draw_packed(rng, row), config)
    return contender._replace(compiles=True)


def hf_bert(row: Row, attention_dropout: float = 0.1) -> Contender:
    """Build transformers' BERT with its defaults, or without attention dropout, which lets it use the faster kernel."""
    config = BertConfig(
        vocab_size=row.vocab,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        hidden_dropout_prob=row.dropout,
        attention_probs_dropout_prob=attention_dropout,
    )
    model = BertForMaskedLM(config)
    model.set_attn_implementation("sdpa")
    return _contender(
        "hf_bert" if attention_dropout else "hf_bert, no attention dropout",
        model,
        lambda inputs: model(**inputs).loss,
        lambda rng: draw_padded(rng, row),
        architecture_of(row, "bert"),
    )


def hf_modernbert(row: Row) -> Contender:
    """Build transformers' ModernBERT with its defaults: windows of 128, whole documents in every third layer."""
    config = ModernBertConfig(
        vocab_size=row.vocab,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        cls_token_id=101,
        sep_token_id=102,
        sparse_prediction=True,
    )
    model = ModernBertForMaskedLM(config)
    model.set_attn_implementation("sdpa")
    return _contender(
        "hf_modernbert",
        model,
        lambda inputs: model(**inputs).loss,
        lambda rng: draw_padded(rng, row),
        architecture_of(row, "modernbert"),
    )


def needed_flops(architecture: MegaBertConfig, lengths: list[int]) -> float:
    """Return the FLOPs of a step, as telemetry/flops.py counts them; other work of a contender does not count."""
    tokens = sum(lengths)
    return step_flops(architecture, tokens, round(MASKED * tokens), sum(length**2 for length in lengths))
