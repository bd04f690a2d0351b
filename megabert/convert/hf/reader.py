"""Read untrusted Hugging Face folders: run no code, open no file outside, allocate no more than the files contain."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabert.data.shards.manifest import TOKENIZER_CONFIG
from megabert.files import json_file
from megabert.files.bounded_reads import has_file
from megabert.files.checkpoint_format import has_checkpoint
from megabert.files.pickles import UNPICKLING_ERRORS
from megabert.process.error_text import first_line

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PYTORCH_BIN = "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
# Weights that are not read, and what makes a folder of them that is.
OTHER_WEIGHTS = {
    "model.*.safetensors": f"rename it to {SAFETENSORS}",
    "pytorch_model.*.bin": f"rename it to {PYTORCH_BIN}",
    "*.safetensors": f"rename it to {SAFETENSORS} if it has the whole model",
    "*.bin": f"rename it to {PYTORCH_BIN} if it has the whole model",
    "tf_model.h5": "load it with from_tf=True in transformers 4, and save it with save_pretrained()",
    "flax_model.msgpack": "load it with from_flax=True in transformers 4, and save it with save_pretrained()",
    "*.ckpt*": "convert this TensorFlow checkpoint with transformers 4 first",
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Upper limits for the sizes in a config: ten times the largest known encoders, and far too small to exhaust memory.
MAX_SIZES = {
    "vocab_size": 10_000_000,
    "hidden_size": 65_536,
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 100_000,
    "num_labels": 100_000,
}
# Names of sizes in the configs of other architectures, and ours, by model_type.
SIZE_ALIASES = {
    "distilbert": {
        "n_layers": "num_hidden_layers",
        "dim": "hidden_size",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
    },
    "electra": {"embedding_size": "hidden_size"},
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, naming the file, for anything else and for a missing file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    return json_file.read_json(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json and check its sizes and labels. Raises ValueError naming the first bad value."""
    path = folder / CONFIG
    if not has_file(path) and has_checkpoint(folder):
        raise ValueError(
            f"{folder}: is a run or a checkpoint. launch/convert_to_hf.py makes the folder of a model of it."
        )
    config = read_json(check_inside(folder, CONFIG) if path.is_file() else path)
    aliases = SIZE_ALIASES.get(str(config.get("model_type")), {})
    largest_sizes = MAX_SIZES | {alias: MAX_SIZES[name] for alias, name in aliases.items()}
    for name, largest in largest_sizes.items():
        size = config.get(name, 1)
        least = 0 if name == "type_vocab_size" else 1
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= largest:
            raise ValueError(f"{path}: {name} is {size!r}, expected a number from {least} to {largest:,}.")
    _check_labels(path, config)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: architectures is {names!r}, expected a list of names.")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path}: has a quantization_config; quantized weights are not supported.")
    return config


def _check_labels(path: Path, config: dict[str, Any]) -> None:
    id2label, label2id = ({} if config.get(name) is None else config[name] for name in ("id2label", "label2id"))
    if not isinstance(id2label, dict) or not all(isinstance(label, str) for label in id2label.values()):
        raise ValueError(f"{path}: id2label is {id2label!r}, expected an object from numbers to labels.")
    if wrong := [number for number in id2label if not number.isdecimal()]:
        raise ValueError(f"{path}: id2label has the keys {', '.join(wrong)}, expected numbers.")
    if not isinstance(label2id, dict) or not all(type(number) is int for number in label2id.values()):
        raise ValueError(f"{path}: label2id is {label2id!r}, expected an object from labels to numbers.")
    if (problem := config.get("problem_type")) is not None and problem not in PROBLEM_TYPES:
        raise ValueError(f"{path}: problem_type is {problem!r}, expected one of {', '.join(PROBLEM_TYPES)}.")


def check_code_stays_inside(folder: Path) -> None:
    """Raise ValueError unless loading the folder can only run code in the folder itself.

    That is: every entry of config.json's auto_map is a class in a file of this folder, nothing else names code, and no
    file is a link to a place outside.
    """
    config = read_config(folder)
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise ValueError(f"{folder / CONFIG}: auto_map is {auto_map!r}, expected an object.")
    for auto_class, entry in auto_map.items():
        module, _, name = entry.partition(".") if isinstance(entry, str) else ("", "", "")
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(
                f"{folder / CONFIG}: auto_map.{auto_class} is {entry!r}, expected module.Class of this folder."
            )
        check_inside(folder, f"{module}.py")
    forbidden = {CONFIG: ("custom_pipelines",), TOKENIZER_CONFIG: ("auto_map", "custom_pipelines")}
    settings = {CONFIG: config}
    if has_file(folder / TOKENIZER_CONFIG):
        settings[TOKENIZER_CONFIG] = read_json(check_inside(folder, TOKENIZER_CONFIG))
    for file, values in settings.items():
        if found := [name for name in forbidden[file] if name in values]:
            raise ValueError(
                f"{folder / file}: has {found[0]}, which names code to run. Folders that MegaBERT writes never have it."
            )
    for path in folder.rglob("*"):
        _check_link(folder, path)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all weights files, memory-mapped where the format allows it.

    Raises ValueError if a file is damaged, or does not contain exactly the tensors that the folder's index lists.
    """
    weights: dict[str, Tensor] = {}
    for path, listed in _find_weights_files(folder).items():
        part = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
        if listed is not None and (missing := sorted(listed - part.keys())):
            raise ValueError(f"{path}: lacks {len(missing)} tensors that the index lists: {', '.join(missing[:3])}.")
        if listed is not None and (extra := sorted(part.keys() - listed)):
            raise ValueError(
                f"{path}: contains {len(extra)} tensors that the index does not list: {', '.join(extra[:3])}."
            )
        weights |= part
    return weights


def _find_weights_files(folder: Path) -> dict[Path, set[str] | None]:
    """Map each weights file to the tensors that an index lists for it, or None without an index.

    Prefers safetensors to pickles and one file to several, as transformers does.
    """
    for name in (SAFETENSORS, PYTORCH_BIN):
        if has_file(folder / name):
            return {check_inside(folder, name): None}
        if has_file(folder / f"{name}.index.json"):
            index = read_json(check_inside(folder, f"{name}.index.json")).get("weight_map")
            if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
                raise ValueError(f"{folder / name}.index.json: has no weight_map from names to files.")
            return {
                check_inside(folder, file, suffix=Path(name).suffix): {
                    tensor for tensor, tensor_file in index.items() if tensor_file == file
                }
                for file in sorted(set(index.values()))
            }
    raise ValueError(
        f"{folder}: has no {SAFETENSORS} and no {PYTORCH_BIN}, in one file or in several.{_explain_other_files(folder)}"
    )


def _explain_other_files(folder: Path) -> str:
    """Say what to do with weights that transformers would find only if told so."""
    for pattern, remedy in OTHER_WEIGHTS.items():
        if found := sorted(path.name for path in folder.glob(pattern) if path.is_file()):
            return f" It has {found[0]}: {remedy}."
    return ""


def check_no_adapter(folder: Path) -> None:
    """Check that the folder has no adapter of peft's, which transformers would apply. Raises ValueError."""
    if not has_file(folder / ADAPTER_CONFIG):
        return
    base = read_json(check_inside(folder, ADAPTER_CONFIG)).get("base_model_name_or_path")
    raise ValueError(
        f"{folder / ADAPTER_CONFIG}: this is an adapter of {base!r}, for example of LoRA. Merge it into its model "
        "first: model.merge_and_unload().save_pretrained(FOLDER) with peft, and convert that folder."
    )


def check_inside(folder: Path, name: str, suffix: str = "") -> Path:
    """Return the path of a file that must be directly in the folder.

    Raises ValueError if `name` is a path, has another suffix, or is a link to a place outside, or if there is no such
    file.
    """
    if Path(name).name != name or name in (".", "..") or not name.endswith(suffix):
        raise ValueError(f"{folder}: names the file {name!r}, expected one directly in this folder.")
    path = folder / name
    _check_link(folder, path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the folder names it.")
    return path


def _check_link(folder: Path, path: Path) -> None:
    """Raise ValueError for a link to a place outside, except to ../../blobs, as in the Hugging Face hub's cache."""
    root, target = folder.resolve(), path.resolve()
    if not target.is_relative_to(root) and target.parent != root.parent.parent / "blobs":
        raise ValueError(f"{path}: is a link to {target}, outside its folder.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        if not _is_utf8(path):
            raise ValueError(
                f"{path}: its name is not UTF-8, so safetensors cannot open it. Rename the file or its folder."
            ) from error
        raise ValueError(f"{path}: damaged: {error}") from error


def _is_utf8(path: Path) -> bool:
    try:
        bytes(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a pickle of tensors with torch's weights-only unpickler, which refuses to run anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNPICKLING_ERRORS as error:
        reason = first_line(error)
        raise ValueError(f"{path}: was not read, because it does not contain only tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        keys = f" It has {', '.join(map(repr, list(state)[:3]))}." if isinstance(state, dict) and state else ""
        raise ValueError(
            f"{path}: does not contain a state dict of tensors.{keys} Save the state dict alone, with its tensors."
        )
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, more data than the file contains.")
    return state
