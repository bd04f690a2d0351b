"""Show which learning rates train small models of which size: nats below the unigram's loss after equally many steps.

    python tests/benchmarks/bench_sizes.py [--quick] [--json FILE]

The recipe is the quickstart's, with other layers and widths, heads of 32 and an FFN of 4 widths, on its text, which
launch/quickstart/prepare.sh prepares. A column is a peak learning rate as a multiple of 1 / width, as in
megabert/recipes/README.md. A trial's loss is the mean over the last tenth of its steps. Where it is not below guessing
tokens by their frequency, the model has learned nothing from context. All sizes take 20 minutes on two cores.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from support import report

import megabert
from megabert.config.recipe import OptimizerConfig
from megabert.data.shards.source import open_corpus
from megabert.files.metrics_format import read_metrics
from megabert.training.telemetry.unigram import UnigramWatch

SIZES = [(2, 128), (12, 128), (4, 256), (12, 256)]
LR_TIMES_WIDTH = (0.16, 0.32, 0.64)
STEPS = 400
QUICK_SIZES, QUICK_LR_TIMES_WIDTH, QUICK_STEPS = [(2, 128)], (0.32, 0.64), 120
HEAD = 32


def train(layers: int, width: int, lr: float, steps: int, folder: Path) -> float:
    """Return the mean training loss over the last tenth of the steps, nats per masked token."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // HEAD,
            "intermediate_size": 4 * width,
        },
        "optimizer": {"lr": lr},
        "run": {
            "output_dir": str(folder), "max_tokens": None, "max_steps": steps, "log_every_steps": max(1, steps // 10),
            "eval_tokens": 1, "save_every_steps": steps, "keep_checkpoints": 1, "trackers": [], "rollback_after": 0,
        },
    }  # fmt: skip
    folder.mkdir()
    with open(folder / "log", "w") as log, contextlib.redirect_stdout(log):
        megabert.pretrain(megabert.load_recipe("quickstart", **sections), "zero0")
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record][-1]


def main() -> None:
    options = report.read_arguments(__doc__ or "")
    sizes, factors = (QUICK_SIZES, QUICK_LR_TIMES_WIDTH) if options.quick else (SIZES, LR_TIMES_WIDTH)
    steps = QUICK_STEPS if options.quick else STEPS
    figures: dict[str, float] = {}
    entropy = None
    print(f"| nats below the unigram after {steps} steps | " + " | ".join(f"lr {f:g} / width" for f in factors) + " |")
    print("|---|" + "---|" * len(factors), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for layers, width in sizes:
            cells = []
            for factor in factors:
                lr = factor / width
                loss = train(layers, width, lr, steps, Path(scratch) / f"{layers}-{width}-{factor}")
                if entropy is None:
                    entropy = unigram_entropy()
                cells.append(f"{entropy - loss:.2f} (lr {lr:.2g})")
                figures[f"{layers}x{width}_lr_{factor:g}_below_unigram"] = entropy - loss
            print(f"| {layers} x {width} | " + " | ".join(cells) + " |", flush=True)
    report.write(figures, options.json, steps=steps)


def unigram_entropy() -> float:
    """Return the loss of guessing training tokens by their frequency. The quickstart's corpus must be there."""
    train = megabert.load_recipe("quickstart").data.train
    assert isinstance(train, str), "the quickstart has one corpus"
    return UnigramWatch(open_corpus([(train, 1.0)]).token_shares, OptimizerConfig()).entropy


if __name__ == "__main__":
    main()
