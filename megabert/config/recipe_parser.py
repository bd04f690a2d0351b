"""Find recipes and ds_configs by name or path, and merge a recipe file with flags by a strict parser."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megabert.config.cli import OR_FILE, Parser, flags_with_values, nearest
from megabert.config.recipe import LENGTHS, Recipe, may_change_at_branch, may_change_at_resume
from megabert.config.settings import flatten, shortened
from megabert.config.strict_yaml import check_value, is_valid, parse_value, read_yaml

PACKAGE = Path(str(resources.files("megabert")))
DEFAULT_RECIPE = "quickstart"


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    return _names(PACKAGE / "recipes", ".yaml")


def recipe_path(name: str) -> Path:
    """Find a recipe by path or, if it comes with the package, by name. Raises ValueError if there is none."""
    return _find(name, "recipe", PACKAGE / "recipes", ".yaml")


def ds_config_names() -> list[str]:
    """List the ds_configs that come with the package."""
    return _names(_ds_config_folder(), ".json")


def ds_config_path(name: str) -> Path:
    """Find a ds_config by path or, if it comes with the package, by name. Raises ValueError if there is none."""
    return _find(name, "ds_config", _ds_config_folder(), ".json")


def load_recipe(name_or_path: str | Path = DEFAULT_RECIPE, **overrides: Any) -> Recipe:
    """Read a recipe, replace settings, and check all of them as the command line does.

    overrides: nested, as model={"hidden_size": 64}, or with dotted names, as **{"model.hidden_size": 64}.
    Raises ValueError, with the message of the command line, for an unknown recipe or setting and for a wrong value.
    """
    flags = [f"--recipe={name_or_path}"]
    for name, value in overrides.items():
        flags += _as_flags(flatten({name: value}))
    parser = _loading_parser()
    with parser.raising():
        return parser.read(flags)[0]


@functools.cache
def _loading_parser() -> "RecipeParser":
    """Build the parser once, which takes longer than reading a recipe."""
    return RecipeParser("load_recipe")


class RecipeParser(Parser):
    """Parses flags, on top of a recipe file, on top of the defaults; an error is one line on stderr and exit code 2."""

    def __init__(self, prog: str = "", description: str = "", **nested: Any):
        super().__init__(prog, description, **nested)
        if nested:
            return
        names = ", ".join(recipe_names())
        self.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"one of {names}, or a YAML file")
        self.add_class_arguments(Recipe)
        for action in self._actions:
            if may_change_at_resume(action.dest):
                action.help = f"{action.help} [may change at a resume]"
            elif may_change_at_branch(action.dest):
                action.help = f"{action.help} [may change in a branch]"
        types = setting_types()
        self._unset = {action.dest: action.default for action in self._actions if action.dest in types}

    def read(self, argv: Sequence[str] | None = None) -> tuple[Recipe, Any]:
        """Parse flags, and the recipe that --recipe names. Returns the recipe and the other flags.

        Nothing of an earlier recipe remains.
        """
        argv = [re.sub("^--(max_hours|resume)(?==|$)", r"--run.\1", word) for word in self.normalize(argv)]
        name = _value_of("--recipe", argv) or DEFAULT_RECIPE
        try:
            path = recipe_path(name)
            settings = read_recipe_file(path)
            # A flag for one length of the run replaces the recipe's, which may be in another unit.
            if any(_value_of(f"--run.{length}", argv) for length in LENGTHS):
                for length in LENGTHS:
                    settings.pop(f"run.{length}", None)
            check_flags(argv)
            # The defaults are set here, so that --help shows them too.
            self.set_defaults(self._unset | {f"run.{length}": None for length in LENGTHS} | settings)
            recipe = self.instantiate(self.parse_args(argv))
        except ValueError as error:
            self.error(str(error))
        parts = {part.name: recipe.pop(part.name) for part in dataclasses.fields(Recipe)}
        try:
            return Recipe(**parts), recipe
        except ValueError as error:
            self.error(str(error))


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read a recipe file into settings with dotted names.

    Raises ValueError for an unknown name or a value of another type. Nothing is imported because of the file.
    """
    settings = read_yaml(path)
    for part in dataclasses.fields(Recipe):
        if part.name in settings and not isinstance(settings[part.name], dict):
            raise ValueError(f"{path}: {part.name} is {shortened(settings[part.name])}, expected settings below it.")
    flat = flatten(settings)
    types = setting_types()
    for key, value in flat.items():
        if key not in types:
            raise ValueError(f"{path}: unknown key {key!r}.{nearest(key, sorted(types))}")
        if value == "":
            raise ValueError(f"{path}: {key} is empty, expected a value.")
        if _is_nothing(types[key], value):
            raise ValueError(f"{path}: {key} is {value!r}. Write null without quotes for no value, {OR_FILE}/{value}.")
        check_value(types[key], value, path, key)
    return flat


def check_flags(argv: list[str]) -> None:
    """Raise ValueError for a flag with a value of another type than its setting. argv: normalized flags."""
    types = setting_types()
    sections = [section.name for section in dataclasses.fields(Recipe)]
    for flag, value in flags_with_values(argv):
        name = flag.removeprefix("--")
        if name in sections or name.endswith(".help"):
            raise ValueError(f"{flag} is not a setting; give single ones, such as --model.hidden_size 768.")
        # A flag of type str may hold what YAML reads as a number, as a path called 1.
        try:
            parsed = parse_value(value)
        except UnicodeEncodeError as error:
            remedy = "Rename the file, or pass a link to it"
            raise ValueError(f"{flag} is {shortened(value)}, which is not UTF-8. {remedy}.") from error
        if name in types and (isinstance(parsed, list) or not is_valid(types[name], value)):
            check_value(types[name], parsed, "", flag)


def _is_nothing(kind: Any, value: object) -> bool:
    """Whether a text, which may be the name of a file, is what jsonargparse takes for no value, such as "~"."""
    return isinstance(value, str) and type(None) in get_args(kind) and parse_value(value) is None


@functools.cache
def setting_types() -> dict[str, Any]:
    """Return the type of each setting of a recipe, by its dotted name."""
    return {
        f"{section}.{name}": kind
        for section, config in get_type_hints(Recipe).items()
        for name, kind in get_type_hints(config).items()
    }


def _ds_config_folder() -> Path:
    """Return the folder of our ds_configs: inside an installed package, beside the package in a checkout."""
    installed = PACKAGE / "ds_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "ds_configs"


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


def _find(name: str, kind: str, folder: Path, suffix: str) -> Path:
    names = _names(folder, suffix)
    if name in names:
        return folder / f"{name}{suffix}"
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"{kind} {name!r} is neither a file nor one of: {', '.join(names)}.{nearest(name, names)}")


def _as_flags(settings: dict[str, object]) -> list[str]:
    """Write dotted names and their values as flags."""
    texts = {
        key: str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
        for key, value in settings.items()
    }
    return [f"--{key}={text}" for key, text in texts.items()]


def _value_of(flag: str, argv: list[str]) -> str | None:
    """Read the value of one flag, given as --flag value or --flag=value, before all flags are parsed."""
    return dict(flags_with_values(argv)).get(flag)
