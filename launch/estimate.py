"""Predict the memory, speed, time and price of a recipe on GPUs, without a GPU.

python launch/estimate.py --recipe mosaicbert-base --gpu h100 --gpus 8 --price 2.5

It takes every setting of a recipe, as launch/pretrain.py does: --data.global_batch_tokens 480000 --run.cuda_graphs auto
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

import dataclasses
from dataclasses import dataclass

from megabert.config import cli
from megabert.config.recipe_parser import RecipeParser
from megabert.config.settings import check_limits, setting


@dataclass(frozen=True)
class Options:
    gpu: str = "h100"
    """the card: a100, h100, h200, b200, l40s, ..."""
    gpus: int = setting(8, "[1, 1048576]")
    """ranks, over all machines of 8"""
    zero: int = setting(1, "[0, 3]")
    """ZeRO stage"""
    price: float | None = setting(None, "(0, 1e6]")
    """dollars per GPU and hour"""


def main() -> None:
    parser = RecipeParser("launch/estimate.py", __doc__ or "")
    parser.add_class_arguments(Options, as_group=False)
    recipe, given = parser.read()
    options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    check_limits(options, "--")
    # Imported after the flags are checked: torch takes seconds to load.
    from megabert.training.roofline.estimate import describe, predict_recipe
    from megabert.training.telemetry.cards import card_named

    prediction = predict_recipe(recipe, card_named(options.gpu), options.gpus, options.zero)
    print(f"{given.recipe} on {options.gpus} x {options.gpu}, ZeRO {options.zero}")
    print(describe(recipe, prediction, options.price))


if __name__ == "__main__":
    cli.run(main, "launch/estimate.py", cli.exit_code)
