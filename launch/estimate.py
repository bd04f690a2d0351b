"""Predict the memory, speed, time and price of a recipe on GPUs, without a GPU.

python launch/estimate.py --recipe mosaicbert-base --gpu h100 --gpus 8 --price 2.5
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

from dataclasses import dataclass

from megabert.config import cli
from megabert.config.recipe_parser import load_recipe
from megabert.config.settings import setting


@dataclass(frozen=True)
class Options:
    recipe: str = "mosaicbert-base"
    """a recipe's name, or a YAML file"""
    gpu: str = "h100"
    """the card: a100, h100, h200, b200, l40s, ..."""
    gpus: int = setting(8, "[1, 1048576]")
    """ranks, over all machines of 8"""
    zero: int = setting(1, "[0, 3]")
    """ZeRO stage"""
    micro_batch_tokens: int | None = None
    """instead of the recipe's"""
    price: float | None = setting(None, "(0, 1e6]")
    """dollars per GPU and hour"""


def main() -> None:
    options = cli.read_flags(Options, "launch/estimate.py", __doc__ or "")
    given = {"micro_batch_tokens": options.micro_batch_tokens} if options.micro_batch_tokens is not None else {}
    recipe = load_recipe(options.recipe, data=given)
    # Imported after the flags are checked: torch takes seconds to load.
    from megabert.training.roofline.estimate import describe, predict_recipe
    from megabert.training.telemetry.cards import card_named

    prediction = predict_recipe(recipe, card_named(options.gpu), options.gpus, options.zero)
    print(f"{options.recipe} on {options.gpus} x {options.gpu}, ZeRO {options.zero}")
    print(describe(recipe, prediction, options.price))


if __name__ == "__main__":
    cli.run(main, "launch/estimate.py", cli.exit_code)
