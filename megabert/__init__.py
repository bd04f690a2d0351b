"""MegaBERT pretrains BERT-style encoders: MosaicBERT, and BERT as its baseline, under DeepSpeed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabert.version import __version__ as __version__

if TYPE_CHECKING:
    from megabert.commands.notebook import PretrainResult
    from megabert.config.recipe import Recipe

# The functions import what they need when they are called: importing megabert loads its version only.


def load_recipe(name_or_path: "str | Path" = "quickstart", **overrides: Any) -> "Recipe":
    """Read a recipe by name or path, and replace settings: load_recipe("quickstart", run={"max_steps": 10}).

    Raises ValueError, with the message of the command line, for an unknown recipe or setting and for a wrong value.
    """
    from megabert.config import cli, recipe_parser

    with cli.installed_names():
        return recipe_parser.load_recipe(name_or_path, **overrides)


def pretrain(recipe: "Recipe", ds_config: "str | Path" = "zero2") -> "PretrainResult":
    """Train a recipe in this process, from its newest checkpoint or its start; ds_config is a name or a file.

    Raises ValueError for a recipe, corpus, ds_config or checkpoint that the user must change.
    """
    from megabert.commands import notebook
    from megabert.config import cli

    with cli.installed_names():
        return notebook.pretrain(recipe, ds_config)


def register_auto_classes() -> None:
    """Let transformers' Auto classes load MegaBERT folders without trust_remote_code."""
    from megabert.model import register_auto_classes

    register_auto_classes()
