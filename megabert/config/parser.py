"""Recipes from YAML and flags, read strictly: an unknown key is an error that names the nearest known one."""

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megabert.config.cli import Parser, nearest
from megabert.config.recipe import LENGTHS, Recipe


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    folder = resources.files("megabert") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """Find a recipe by the name of one of ours, or by path. Raises ValueError naming the known ones."""
    if name in recipe_names():
        return Path(str(resources.files("megabert") / "recipes" / f"{name}.yaml"))
    if Path(name).is_file():
        return Path(name)
    raise ValueError(
        f"recipe {name!r} is neither a file nor one of: {', '.join(recipe_names())}.{nearest(name, recipe_names())}"
    )


class RecipeParser(Parser):
    """Flags over a recipe over the defaults; a user's mistake is one line on stderr and exit code 2."""

    def __init__(self, prog: str = "", description: str = "", **nested: Any):
        super().__init__(prog, description, **nested)
        if nested:
            return
        self.add_argument("--recipe", default="quickstart", help=f"one of {', '.join(recipe_names())}, or a YAML file")
        self.add_class_arguments(Recipe)

    def read(self, argv: list[str] | None = None) -> tuple[Recipe, Any]:
        """Parse flags and the recipe they name. Returns the recipe and the other flags. Exits with 2 on mistakes."""
        words = self.normalize(argv)
        argv = [re.sub("^--(max_hours|resume)(?==|$)", r"--run.\1", word) for word in words]
        name = _value_of("--recipe", argv) or self.get_defaults()["recipe"]
        try:
            path = recipe_path(name)
            settings = _flatten(read_yaml(path, self.known_keys()))
            if any(
                _value_of(f"--run.{length}", argv) for length in LENGTHS
            ):  # replaces the recipe's own, in what unit ever
                for length in LENGTHS:
                    settings.pop(f"run.{length}", None)
            # Once as flags, so that the recipe's values are checked as the user's are; then as defaults, which --help shows.
            flags = [
                f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
            ]
            self.parse_args(flags)
            self.set_defaults(settings)
            recipe = self.instantiate(self.parse_args(argv))
        except ValueError as mistake:
            self.error(str(mistake))
        parts = {part.name: recipe.pop(part.name) for part in dataclasses.fields(Recipe)}
        try:
            return Recipe(**parts), recipe
        except ValueError as mistake:
            self.error(str(mistake))


def read_yaml(path: Path, known: list[str]) -> dict[str, Any]:
    """Read a recipe file. Raises ValueError for a key that is not among the dotted `known` ones, naming the nearest."""
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as mistake:
        raise ValueError(f"{path}: not valid YAML: {mistake}") from mistake
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds a {type(settings).__name__}, expected keys such as model: and data:.")
    for part in dataclasses.fields(Recipe):
        if part.name in settings and not isinstance(settings[part.name], dict):
            raise ValueError(f"{path}: {part.name} is {settings[part.name]!r}, expected settings below it.")
    for key in _flatten(settings):
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}.{nearest(key, known)}")
    return settings


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _value_of(flag: str, argv: list[str]) -> str | None:
    """Read one flag ahead of the rest: --flag value or --flag=value."""
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
