"""Recipes as the command line reads them."""

import functools

from megabert.config.recipe import Recipe
from megabert.config.recipe_parser import RecipeParser


def read_recipe(*flags: str) -> Recipe:
    """Parse the flags of launch/pretrain.py. An error is one line on stderr and exit code 2."""
    return _parser().read(list(flags))[0]


@functools.cache
def _parser() -> RecipeParser:
    """One for all tests, because building it takes longer than reading a recipe."""
    return RecipeParser("pretrain")
