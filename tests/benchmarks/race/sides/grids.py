"""What the race searches, and how long it trains: settings of both sides, budgets, seeds."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from race.sides.baseline import Baseline
from race.sides.ours import Ours

SEARCH_SEEDS = (1, 2)
FIRST_FINAL_SEED = 1001


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """Budgets are seconds of training by the clock. Ladders are shares: budget / 8, budget / 6, ..."""

    budget_s: float
    seeds: int
    """of the final runs of each side and of each attempt"""
    baseline_rungs: tuple[float, ...]
    """successive halving: the budget is divided by each of these in turn, and a quarter of the settings is kept"""
    our_rungs: tuple[float, ...]
    ladder: tuple[float, ...]
    """our budgets: the baseline's, divided by each of these, the shortest first"""
    examples: int
    """most examples of a task to train on, and to score; 0: all"""

    def final_seeds(self, attempt: int) -> range:
        """Return fresh seeds. Attempt 0 is the baseline's, each of ours has its own."""
        return range(FIRST_FINAL_SEED + attempt * self.seeds, FIRST_FINAL_SEED + (attempt + 1) * self.seeds)


FULL = SearchPlan(
    budget_s=600.0,
    seeds=5,
    baseline_rungs=(8, 4, 1),
    our_rungs=(8,),
    ladder=(16, 12, 10, 8, 7, 6, 5, 4, 3, 2.5, 2, 1.5, 1),
    examples=0,
)
QUICK = SearchPlan(
    # Compilation takes our side some 15 s of each budget.
    budget_s=60.0,
    seeds=1,
    baseline_rungs=(3,),
    our_rungs=(1.5,),
    ladder=(1.5, 1),
    examples=256,
)


def baseline_grid(quick: bool) -> list[Baseline]:
    """Return the baseline's settings: both layouts, three batches, two learning rates and masking rates, and variants.

    The variants change one or two settings each: the rest of what the baseline may choose.
    """
    if quick:
        return [Baseline(lr=lr, initializer_range=spread) for lr in (5e-4, 1e-3) for spread in (0.02, 0.05)]
    grid = [
        Baseline(layout=layout, batch=batch, lr=lr, masking=masking)
        for layout, batch, lr, masking in itertools.product(
            ("documents", "blocks"), (8, 16, 32), (5e-4, 1e-3), (0.15, 0.3)
        )
    ]
    variants: list[dict[str, Any]] = [
        {"layout": "documents", "grouped": True},
        {"layout": "documents", "initializer_range": 0.05},
        {"initializer_range": 0.05},
        {"initializer_range": 0.05, "masking": 0.3},
        {"initializer_range": 0.05, "lr": 2e-3},
        {"initializer_range": 0.05, "batch": 8},
        {"lr": 2e-3},
        {"lr": 2e-3, "warmup": 0.2},
        {"warmup": 0.2},
        {"warmup": 0.2, "initializer_range": 0.05, "lr": 2e-3},
        {"dropout": 0.1},
        {"dropout": 0.1, "initializer_range": 0.05},
        {"batch": 64, "lr": 2e-3},
        {"batch": 64, "lr": 1e-3},
        {"compiled": True},
        {"batch": 8, "lr": 2.5e-4, "masking": 0.3},
        {"lr": 2.5e-4, "masking": 0.3},
        {"batch": 8, "lr": 5e-4, "masking": 0.3, "warmup": 0.2},
        {"batch": 8, "masking": 0.3, "warmup": 0.2},
        {"batch": 8, "lr": 5e-4, "masking": 0.3, "initializer_range": 0.03},
    ]
    return grid + [dataclasses.replace(Baseline(), **variant) for variant in variants]


def our_grid(quick: bool) -> list[Ours]:
    """Return our settings: the best of earlier searches. What these have shown to lose is in the README."""
    if quick:
        return [Ours({"optimizer.lr": lr, "model.initializer_range": 0.05}) for lr in (1e-3, 2e-3)]
    best = {
        "optimizer.name": "muon", "optimizer.max_grad_norm": 0.0, "optimizer.lr": 8e-3, "optimizer.muon_lr": 0.014,
        # With this FFN GeGLU has about as many weights as the baseline's.
        "data.micro_batch_tokens": 4096, "model.intermediate_size": 704, "model.embedding_neighbors": 2,
    }  # fmt: skip
    return [Ours(best)]


# Layers, width, heads, FFN of the open class, in which each side may leave the size of the other class.
SHAPES = (
    (4, 256, 4, 1024),
    (4, 256, 4, 512),
    (2, 256, 4, 1024),
    (3, 160, 5, 640),
    (2, 384, 6, 1536),
    (6, 256, 4, 1024),
)


def open_baselines(best: Baseline) -> list[Baseline]:
    """Return the best of the same-size class in every shape."""
    return [dataclasses.replace(best, layers=n, width=w, heads=h, ffn=f) for n, w, h, f in SHAPES]


def open_ours(best: Ours) -> list[Ours]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    shapes = [{f"model.{name}": size for name, size in zip(names, shape, strict=True)} for shape in SHAPES]
    return [Ours(dict(best.changes) | shape) for shape in shapes]
