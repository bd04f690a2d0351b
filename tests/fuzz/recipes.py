"""Hostile recipes and flags, through the parser of launch/pretrain.py."""

import contextlib
import functools
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from megabert.config.cli import SWITCH_VALUES
from megabert.config.recipe import Recipe
from megabert.config.recipe_parser import RecipeParser, load_recipe, setting_types
from megabert.config.strict_yaml import parse_value, read_yaml
from tests.fuzz.mutations import hostile_value, hostile_yaml, leaves, mutate_bytes, mutate_tree
from tests.fuzz.outcome import Case


def recipe_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield recipe files with hostile values, names, YAML or bytes."""
    path = folder / "fuzzed.yaml"
    base = load_recipe("mosaicbert-base").to_dict()
    text = yaml.safe_dump(base, sort_keys=False, width=10**9).encode()
    while True:
        refused = ""
        choice = random.random()
        if choice < 0.5:
            data = yaml.safe_dump(mutate_tree(base, random), allow_unicode=True, width=10**9).encode()
        elif choice < 0.7:
            data, refused = hostile_yaml(text, random)
        else:
            data = mutate_bytes(text, random)
        path.write_bytes(data)

        def run() -> tuple[Recipe, dict[str, Any]]:
            return parse(["--recipe", str(path)]), read_yaml(path)

        def is_right(result: Any, refused: str = refused) -> bool:
            recipe, written = result
            return not refused and says(recipe, leaves(written))

        yield Case(f"recipe with {refused} {data[:200]!r}", run, is_right, (str(path), *sections()))


def flag_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield command lines with hostile, scaled and swapped values; every third has a flag repeated, cut or emptied."""
    names = sorted(setting_types())
    usual = leaves(load_recipe("mosaicbert-base").to_dict())
    while True:
        given = {name: _flag_text(name, usual, random) for name in random.sample(names, random.randint(1, 3))}
        flags = [[f"--{name}={text}"] if random.random() < 0.5 else [f"--{name}", text] for name, text in given.items()]
        refused = random.random() < 0.3 and _spoil(flags, random)
        argv = [word for flag in flags for word in flag]
        words = (*(part.rpartition(".")[2] for part in given), "--", "word", *sections())

        def is_right(recipe: Any, given: dict[str, str] = given, refused: bool = refused) -> bool:
            found = leaves(recipe.to_dict())
            return not refused and all(_is_text_of(found[name], text) for name, text in given.items())

        yield Case(f"flags {argv}", lambda argv=argv: parse(argv), is_right, words)


def _flag_text(name: str, usual: dict[str, Any], random: Random) -> str:
    """A hostile value, another setting's, or the usual one, larger or smaller, as the text of a flag."""
    if random.random() < 0.03:
        # What Python makes of an argument's bytes that are not UTF-8.
        return "a\udcff"
    value = random.choice([hostile_value(random), usual[random.choice(list(usual))], usual.get(name)])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.5:
        value = value * random.choice([-1, 0, 0.5, 2, 3, 10**9])
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).strip("\n.").strip()


def _is_text_of(found: Any, text: str) -> bool:
    """Whether a setting has the value that its flag's text says."""
    if isinstance(found, bool):
        return json.dumps(found) == SWITCH_VALUES[text.lower()]
    return found == text or _same(found, parse_value(text))


def _spoil(flags: list[list[str]], random: Random) -> bool:
    """Change one flag so that the command line must be refused; returns True."""
    flag = random.choice(flags)
    name, _, value = flag[0].partition("=")
    changed: list[list[str]] = [
        [flag[0], *flag[1:], *flag],
        [f"{name}=x", *flag],
        [f"{name}="],
        [name, ""],
        [name[:-1], *(flag[1:] or [value or "1"])],
        [name.upper(), *flag[1:]],
        [name.rpartition(".")[0], *(flag[1:] or [value or "1"])],
        [*flag, "word"],
        [*flag, "--recipe="],
        [*flag, "--recipe", "bert-base", "--recipe", "quickstart"],
        [*flag, "--rec", "bert-base"],
    ]
    flag[:] = random.choice(changed)
    return True


def parse(argv: list[str]) -> Recipe:
    """Parse as the command does, and raise its printed error as a ValueError."""
    printed = io.StringIO()
    parser, defaults = _parser()
    # The parser takes the values of a recipe file as its defaults.
    for action, default in defaults:
        action.default = default
    try:
        with contextlib.redirect_stderr(printed):
            return parser.read(argv)[0]
    except SystemExit as end:
        if end.code != 2:
            raise AssertionError(f"exit code {end.code}") from end
        raise ValueError(printed.getvalue().strip("\n")) from end


@functools.cache
def _parser() -> tuple[RecipeParser, list[tuple[Any, Any]]]:
    """The parser and its defaults, made once: that takes as long as a hundred readings."""
    parser = RecipeParser("pretrain")
    return parser, [(action, action.default) for action in parser._actions]


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
