"""Predict the memory, speed, time and price of a recipe on GPUs, without a GPU.

python launch/estimate.py --recipe mosaicbert-base --gpu h100 --gpus 8 --price 2.5
"""

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.") from None

if __name__ == "__main__":
    end_at_ctrl_c()

from megabert.config import cli
from megabert.config.recipe_parser import load_recipe


def main() -> None:
    parser = cli.Parser("launch/estimate.py", __doc__ or "")
    parser.add_argument("--recipe", default="mosaicbert-base", help="a recipe's name, or a YAML file")
    parser.add_argument("--gpu", default="h100", help="the card: a100, h100, h200, b200, l40s, ...")
    parser.add_argument("--gpus", type=int, default=8, help="ranks, over all machines of 8")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage, 0 to 3")
    parser.add_argument("--micro_batch_tokens", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--price", type=float, default=None, help="dollars per GPU and hour")
    options = parser.parse_args()
    for name, lowest, highest in (("gpus", 1, 1 << 20), ("zero", 0, 3)):
        if not lowest <= getattr(options, name) <= highest:
            raise ValueError(f"--{name} is {getattr(options, name)}, expected {lowest} to {highest}.")
    if options.price is not None and not 0 < options.price <= 1e6:
        raise ValueError(f"--price is {options.price}, expected more than 0 and at most 1e6.")
    given = {"micro_batch_tokens": options.micro_batch_tokens} if options.micro_batch_tokens is not None else {}
    recipe = load_recipe(options.recipe, data=given)
    # Imported after the flags are checked: torch takes seconds to load.
    from megabert.training.roofline.estimate import describe, predict_recipe
    from megabert.training.telemetry.cards import card_named

    prediction = predict_recipe(recipe, card_named(options.gpu), options.gpus, options.zero)
    print(f"{options.recipe} on {options.gpus} x {options.gpu}, ZeRO {options.zero}")
    print(describe(recipe, prediction, options.price))


if __name__ == "__main__":
    cli.run(main, "launch/estimate.py")
