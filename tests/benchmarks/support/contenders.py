"""The models that bench_train.py compares, and one optimizer step of each on real tokens.

All have the same layers, width, heads and FFN, bf16 autocast, torch's fused AdamW, 30 % masking, and their own default
dropout: 0.1 on hidden states; BERT also 0.1 on attention weights; ModernBERT none. With dropout on attention weights,
PyTorch's attention on a CPU does not use its fused kernel, so hf_bert is also measured without it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

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

    tokens: of a bin of MegaBERT; rows: of a padded batch of the others.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    cap: int
    tokens: int
    rows: int


ROWS = {
    "mini_128": Row(4, 256, 4, 1024, cap=128, tokens=4096, rows=32),
    "mini_512": Row(4, 256, 4, 1024, cap=512, tokens=4096, rows=16),
    "small_512": Row(6, 512, 8, 2048, cap=512, tokens=4096, rows=16),
    "base_128": Row(12, 768, 12, 3072, cap=128, tokens=8192, rows=32),
}


if DEVICE.type == "cuda":
    ROWS = {name: row._replace(tokens=GPU_TIMES * row.tokens, rows=GPU_TIMES * row.rows) for name, row in ROWS.items()}


class Contender(NamedTuple):
    """A model and its optimizer.

    compute_loss(inputs) returns the mean over masked tokens. draw(rng) returns a step's batches and the lengths of its
    documents. ffn_matrices: 3 for a gated FFN, 2 for BERT's. compiles: the first step calls a compiler.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute_loss: Callable[[dict], Tensor]
    draw: Callable[[np.random.Generator], tuple[list[dict], list[int]]]
    ffn_matrices: int
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


def document_lengths(rng: np.random.Generator, cap: int) -> Iterator[int]:
    """Draw from Lognormal(5.5, 1.0), the lengths of web documents, cut at the cap; at least [CLS], a token, [SEP]."""
    while True:
        yield int(np.clip(rng.lognormal(5.5, 1.0), 3, cap))


def draw_packed(rng: np.random.Generator, row: Row) -> tuple[list[dict], list[int]]:
    """Draw one bin of exactly row.tokens real tokens; its last document is cut to fit."""
    lengths: list[int] = []
    for length in document_lengths(rng, row.cap):
        lengths.append(min(length, row.tokens - sum(lengths)))
        if sum(lengths) == row.tokens:
            break
    ids = torch.from_numpy(rng.integers(LOWEST_ID, VOCAB, row.tokens))
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
    source = document_lengths(rng, row.cap)
    while not batches or sum(drawn) * (len(batches) + 0.5) / len(batches) < row.tokens:
        lengths = [next(source) for _ in range(row.rows)]
        ids = torch.from_numpy(rng.integers(LOWEST_ID, VOCAB, (row.rows, max(lengths))))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        hidden = torch.from_numpy(rng.random(ids.shape) < MASKED) & mask.bool()
        labels = torch.where(hidden, ids, -100)
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
        drawn += lengths
    return batches, drawn


def _contender(name: str, model: nn.Module, compute_loss: Callable, draw: Callable, gated: bool) -> Contender:
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    return Contender(name, model.train(), optimizer, compute_loss, draw, 3 if gated else 2)


def ours(name: str, row: Row, checkpoint_every: int = 0) -> Contender:
    """Build MegaBERT's MosaicBERT, or with a name that begins with "bert" its BERT, with the ops of run.ops auto."""
    bert = {"position": "learned", "ffn": "gelu", "attention_probs_dropout_prob": 0.1}
    classic = bert if name.startswith("bert") else {}
    config = MegaBertConfig(
        vocab_size=VOCAB,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        **classic,
    )
    model = MegaBertForMaskedLM(config)
    set_ops(model, resolve("auto", DEVICE, config, bf16=True))
    model.bert.encoder.checkpoint_every = checkpoint_every

    def compute_loss(inputs: dict) -> Tensor:
        output = model(**inputs)
        return output.loss_sum / output.num_targets

    contender = _contender(name, model, compute_loss, lambda rng: draw_packed(rng, row), gated=not classic)
    return contender._replace(compiles=True)


def hf_bert(row: Row, attention_dropout: float = 0.1) -> Contender:
    """Build transformers' BERT with its defaults, or without attention dropout, which lets it use the faster kernel."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        attention_probs_dropout_prob=attention_dropout,
        attn_implementation="sdpa",
    )
    model = BertForMaskedLM(config)
    return _contender(
        "hf_bert" if attention_dropout else "hf_bert, no attention dropout",
        model,
        lambda inputs: model(**inputs).loss,
        lambda rng: draw_padded(rng, row),
        gated=False,
    )


def hf_modernbert(row: Row) -> Contender:
    config = ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        cls_token_id=101,
        sep_token_id=102,
        sparse_prediction=True,
        attn_implementation="sdpa",
    )
    model = ModernBertForMaskedLM(config)
    return _contender(
        "hf_modernbert", model, lambda inputs: model(**inputs).loss, lambda rng: draw_padded(rng, row), gated=True
    )


def needed_flops(row: Row, lengths: list[int], ffn_matrices: int) -> float:
    """Return the FLOPs of a step, as telemetry/flops.py counts them; other work of a contender does not count."""
    config = MegaBertConfig(
        vocab_size=VOCAB,
        hidden_size=row.hidden,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        intermediate_size=row.ffn,
        ffn="geglu" if ffn_matrices == 3 else "gelu",
    )
    tokens = sum(lengths)
    return step_flops(config, tokens, round(MASKED * tokens), sum(length**2 for length in lengths))
