"""Read the names of labels that a parquet file holds as numbers, from its metadata or the data set's README.md."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from megabert.config.strict_yaml import read_small_file
from megabert.finetune.tasks.task import Task
from megabert.process.error_text import one_line

INTEGER = re.compile(r"-?[0-9]+")


def read_label_names(task: Task, path: Path, metadata: dict[bytes, bytes]) -> list[str] | None:
    """Return the names of the numbers in a parquet file's label column, from its metadata or the data set's README.md.

    Returns None if neither names them, and the task's labels are themselves numbers. Raises ValueError if the labels
    are words, or others than those that were found.
    """
    names = _names_in_metadata(task, metadata.get(b"huggingface", b"{}"))
    readme = path.absolute().parent.parent / "README.md"
    if names is None:
        names = _names_in_readme(task, readme)
    if names is None and all(INTEGER.fullmatch(name) for name in task.labels):
        return None
    if names is None:
        raise ValueError(
            f"{path}, column {task.label}: holds numbers, and neither the file's metadata nor {readme} names "
            f"them. Write the labels as words: {', '.join(task.labels)}."
        )
    if sorted(names) != sorted(task.labels):
        raise ValueError(f"{path}, column {task.label}: has labels {', '.join(names)}, not {', '.join(task.labels)}.")
    return names


def _names_in_metadata(task: Task, text: bytes) -> list[str] | None:
    """Return the label names that the datasets library writes into a parquet file's metadata."""
    try:
        found = _get(json.loads(text), "info", "features", task.label, "names")
    except (ValueError, RecursionError):
        # The metadata was written by another program.
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


def _names_in_readme(task: Task, path: Path) -> list[str] | None:
    """Return the label names in the YAML at the top of a hub data set's README."""
    if not path.is_file():
        return None
    match = re.match(rb"---\r?\n(.*?)\n---", read_small_file(path), re.DOTALL)
    try:
        infos = _get(yaml.safe_load(match[1]), "dataset_info") if match else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML raises ValueError for a date that does not exist.
        raise ValueError(f"{path}: its front matter is not valid YAML: {one_line(error)}") from error
    for info in infos if isinstance(infos, list) else [infos]:
        features = _get(info, "features")
        if _get(info, "config_name") == task.name and isinstance(features, list):
            for feature in features:
                names = _get(feature, "dtype", "class_label", "names")
                if _get(feature, "name") == task.label and isinstance(names, dict):
                    numbers = {str(number): str(name) for number, name in names.items() if isinstance(name, str | int)}
                    if sorted(numbers) == sorted(map(str, range(len(numbers)))):
                        return [numbers[str(number)] for number in range(len(numbers))]
    return None


def _get(value: Any, *keys: str) -> Any:
    """Return the value under nested keys; None if a key is missing or its value is no dict."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
