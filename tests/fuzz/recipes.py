"""Hostile recipes and flags, through the parser of launch/pretrain.py."""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from megabert.config.parser import RecipeParser, load_recipe, setting_types
from megabert.config.recipe import Recipe
from megabert.config.strict_yaml import read_yaml
from tests.fuzz.mutations import hostile_value, leaves, mutate_bytes, mutate_tree
from tests.fuzz.outcome import Case


def recipe_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield recipe files with hostile values, names or bytes."""
    path = folder / "fuzzed.yaml"
    base = load_recipe("mosaicbert-base").to_dict()
    text = yaml.safe_dump(base, sort_keys=False).encode()
    while True:
        if random.random() < 0.6:
            tree = mutate_tree(base, random)
            data = yaml.safe_dump(tree, allow_unicode=True, width=10**9).encode()
        else:
            data = mutate_bytes(text, random)
        path.write_bytes(data)

        def run() -> tuple[Recipe, dict[str, Any]]:
            return parse(["--recipe", str(path)]), read_yaml(path)

        def is_right(result: Any) -> bool:
            recipe, written = result
            return says(recipe, leaves(written))

        yield Case(f"recipe {data[:200]!r}", run, is_right, (str(path), *sections()))


def flag_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield command lines with hostile values, repeated, misspelt and empty flags."""
    names = sorted(setting_types())
    while True:
        argv: list[str] = []
        given: dict[str, str] = {}
        for _ in range(random.randint(1, 3)):
            name = random.choice(names)
            value = hostile_value(random)
            text = (
                value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip("\n.").strip()
            )
            if random.random() < 0.1:
                name = name[:-1]
            argv += [f"--{name}={text}"] if random.random() < 0.5 else [f"--{name}", text]
            given[name] = text
        words = (*(part.rpartition(".")[2] for part in given), "word", *sections())
        yield Case(f"flags {argv}", lambda argv=argv: parse(argv), lambda _: True, words)


def parse(argv: list[str]) -> Recipe:
    """Parse as the command does, and raise its printed error as a ValueError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return RecipeParser("pretrain").read(argv)[0]
    except SystemExit as end:
        if end.code != 2:
            raise AssertionError(f"exit code {end.code}") from end
        raise ValueError(printed.getvalue().strip("\n")) from end


def says(recipe: Recipe, written: dict[str, Any]) -> bool:
    """Whether a recipe has every value that was written, and no number that is not finite."""
    found = leaves(recipe.to_dict())
    finite = all(math.isfinite(value) for value in found.values() if isinstance(value, float))
    return finite and all(_same(found.get(name), value) for name, value in written.items())


def _same(found: Any, written: Any) -> bool:
    if isinstance(written, list) and isinstance(found, list):
        parts = zip(written, found, strict=False)
        return len(written) == len(found) and all(
            _same(other, part) if not isinstance(part, dict) else all(_same(other.get(k), v) for k, v in part.items())
            for part, other in parts
        )
    return (type(found) is type(written) and found == written) or (
        isinstance(written, int) and isinstance(found, float) and found == written
    )


def sections() -> list[str]:
    """What an error may name if it is about a whole section or a rule over several settings."""
    return [*sorted(setting_types()), "the recipe", "model", "data", "masking", "optimizer", "run ", "probe"]
