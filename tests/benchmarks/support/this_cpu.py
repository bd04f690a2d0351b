"""The prediction for this machine's CPU beside the measured speed of bench_train.py's rows, for bench_estimate.py."""

import numpy as np
import torch
from bench_train import gemm_gflops, seconds

from megabert.config.recipe import ModelConfig
from megabert.training.micro_batch.batch import Batch
from megabert.training.roofline.estimate import predict
from megabert.training.telemetry.cards import Card

from .contenders import MASKED, ROWS, Row, ours

QUICKSTART = "quickstart"
NAMES = (QUICKSTART, "mini_128", "small_512")
# Bytes of the copy that is timed: more than the caches hold.
COPIED = 1 << 28
ROUNDS = 5


def bandwidth() -> float:
    """Return the bytes per second of a copy, which reads and writes."""
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    return 2 * COPIED / min(seconds(lambda: target.copy_(source)) for _ in range(ROUNDS))


def card_of(row: Row, moved: float) -> Card:
    """Describe this CPU as a card: its peak is the best matrix product of the row's shapes. moved: bytes/s."""
    peak = max(gemm_gflops(row) for _ in range(2)) * 1e9
    return Card(name="cpu", pattern="cpu", bf16=peak, fp32=peak, bandwidth=moved, memory=0.0, link=0.0)


def measure(row: Row, rounds: int) -> tuple[float, Batch]:
    """Return the tokens/s of the fastest step, as the peak is the fastest product, and what a bin computes."""
    rng, contender = np.random.default_rng(17), ours("mosaicbert", row)
    contender.step(contender.draw(rng)[0])
    speeds, squares, total = [], 0.0, 0.0
    for _ in range(rounds):
        batches, lengths = contender.draw(rng)
        speeds.append(sum(lengths) / seconds(lambda batches=batches: contender.step(batches)))
        squares, total = squares + sum(length**2 for length in lengths), total + sum(lengths)
    tokens = total / rounds
    batch = Batch(tokens=tokens, slots=row.tokens, masked=MASKED * tokens, attended=squares / total)
    return max(speeds), batch


def compare(quick: bool) -> dict[str, float]:
    """Print predicted and measured tokens/s. Returns the differences as figures."""
    print("\n| this CPU, bench_train.py's row | measured | predicted | difference |\n|---|---|---|---|")
    moved, figures = bandwidth(), {}
    for name in (QUICKSTART,) if quick else NAMES:
        row = ROWS[name]
        speed, batch = measure(row, 2 if quick else ROUNDS)
        model = ModelConfig(
            num_hidden_layers=row.layers,
            hidden_size=row.hidden,
            num_attention_heads=row.heads,
            intermediate_size=row.ffn,
            hidden_dropout=row.dropout,
        )
        prediction = predict(
            model, batch, card_of(row, moved), gpus=1, accumulation=1, zero_stage=0, vocab_size=row.vocab
        )
        difference = prediction.tokens_per_s / speed - 1
        figures[f"estimate_cpu_{name}"] = difference
        print(f"| {name} | {speed:,.0f} | {prediction.tokens_per_s:,.0f} | {difference:+.0%} |", flush=True)
    return figures
