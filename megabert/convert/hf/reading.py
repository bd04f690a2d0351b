"""Read a Hugging Face folder as if a stranger had sent it.

Executes nothing, allocates nothing that the files do not hold, and opens no file outside the folder.
"""

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabert.data.shards.tokenizer import TOKENIZER_CONFIG

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# The largest sizes that a config may ask for: ten times the largest encoders there are, and far below what would fill a memory.
LARGEST = {
    "vocab_size": 10_000_000,
    "hidden_size": 65_536,
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 100_000,
    "num_labels": 100_000,
}
UNREADABLE = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AssertionError,
    TypeError,
    ValueError,
    AttributeError,
)
"""What torch's unpickler raises for bytes that are no pickle of tensors."""


def read_json(path: Path) -> dict[str, Any]:
    """Read an object. Raises ValueError if the file is not there or is something else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as mistake:
        raise ValueError(f"{path}: not valid JSON: {mistake}") from mistake
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, its sizes and labels within reason. Raises ValueError naming the first that is not."""
    path = folder / CONFIG
    config = read_json(inside(folder, CONFIG) if path.is_file() else path)
    for name, largest in LARGEST.items():
        size = config.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
            raise ValueError(f"{path}: {name} is {size!r}, expected a number from 1 to {largest:,}.")
    labels, numbers = ({} if config.get(name) is None else config[name] for name in ("id2label", "label2id"))
    if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
        raise ValueError(f"{path}: id2label is {labels!r}, expected an object from numbers to labels.")
    if wrong := [number for number in labels if not number.isdecimal()]:
        raise ValueError(f"{path}: id2label has the keys {', '.join(wrong)}, expected numbers.")
    if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
        raise ValueError(f"{path}: label2id is {numbers!r}, expected an object from labels to numbers.")
    if (what := config.get("problem_type")) is not None and what not in PROBLEM_TYPES:
        raise ValueError(f"{path}: problem_type is {what!r}, expected one of {', '.join(PROBLEM_TYPES)}.")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path}: has a quantization_config; quantized weights are not read.")
    return config


def check_code_stays_inside(folder: Path) -> None:
    """Raises ValueError unless all code that loading the folder runs is a class of a file in this very folder.

    So every entry of config.json's auto_map is one, nothing else names code, and no file is a link that leads out.
    """
    config = read_config(folder)
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise ValueError(f"{folder / CONFIG}: auto_map is {auto_map!r}, expected an object.")
    for auto, entry in auto_map.items():
        module, _, name = entry.partition(".") if isinstance(entry, str) else ("", "", "")
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(f"{folder / CONFIG}: auto_map.{auto} is {entry!r}, expected module.Class of this folder.")
        inside(folder, f"{module}.py")
    others = {CONFIG: config}
    if (folder / TOKENIZER_CONFIG).is_file():
        others[TOKENIZER_CONFIG] = read_json(inside(folder, TOKENIZER_CONFIG))
    for name, settings in others.items():
        if named := [
            key for key in ("auto_map", "custom_pipelines") if key in settings and (name, key) != (CONFIG, "auto_map")
        ]:
            raise ValueError(f"{folder / name}: has {named[0]}, which names code to run; no folder of ours has it.")
    for path in folder.rglob("*"):
        _check_link(folder, path)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's weights files, mapped from the disk where the format can.

    Raises ValueError if they are damaged, or not those that the folder's index names.
    """
    weights: dict[str, Tensor] = {}
    for path, named in _weights_files(folder).items():
        part = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
        if named is not None and (lacking := sorted(named - part.keys())):
            raise ValueError(
                f"{path}: lacks {len(lacking)} tensors that the index says it holds: {', '.join(lacking[:3])}."
            )
        if named is not None and (extra := sorted(part.keys() - named)):
            raise ValueError(
                f"{path}: holds {len(extra)} tensors that the index does not name: {', '.join(extra[:3])}."
            )
        weights |= part
    return weights


def _weights_files(folder: Path) -> dict[Path, set[str] | None]:
    """Each file, and the tensors that an index says it holds. safetensors before pickles, one file before several, as
    transformers chooses."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return {inside(folder, name): None}
        if (folder / f"{name}.index.json").is_file():
            index = read_json(inside(folder, f"{name}.index.json")).get("weight_map")
            if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
                raise ValueError(f"{folder / name}.index.json: has no weight_map from names to files.")
            return {
                inside(folder, file, suffix=Path(name).suffix): {name for name, where in index.items() if where == file}
                for file in sorted(set(index.values()))
            }
    raise ValueError(f"{folder}: has no {SAFETENSORS} and no {PICKLED}, whole or in parts.")


def inside(folder: Path, name: str, suffix: str = "") -> Path:
    """A file directly in the folder. Raises ValueError for a name that leads elsewhere, or a file that is not there."""
    if Path(name).name != name or name in (".", "..") or not name.endswith(suffix):
        raise ValueError(f"{folder}: names the file {name!r}, expected one directly in this folder.")
    path = folder / name
    _check_link(folder, path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the folder names it.")
    return path


def _check_link(folder: Path, path: Path) -> None:
    """Raises ValueError for a link out of the folder. The hub's cache is made of links to ../../blobs, which may be."""
    root, real = folder.resolve(), path.resolve()
    if not real.is_relative_to(root) and real.parent != root.parent.parent / "blobs":
        raise ValueError(f"{path}: is a link to {real}, outside its folder.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as mistake:
        raise ValueError(f"{path}: damaged: {mistake}") from mistake


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """A pickle of tensors and nothing else: whatever else it asks for is refused before it runs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNREADABLE as mistake:
        reason = next(iter(str(mistake).strip().splitlines()), type(mistake).__name__)
        raise ValueError(f"{path}: is not a file of tensors alone, and was not read: {reason}") from mistake
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: holds something else than tensors by name.")
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} says it is {tuple(tensor.shape)}, more than the file holds.")
    return state
