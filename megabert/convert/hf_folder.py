"""A Hugging Face folder: written as transformers writes it, and read as if a stranger had sent it.

Reading executes nothing, allocates nothing that the files do not hold, and opens no file outside the folder.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

from megabert.data.manifest import TOKENIZER
from megabert.data.tokenizer import TOKENIZER_CONFIG, read_tokenizer
from megabert.model.configuration_megabert import MegaBertConfig

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
MODEL_CODE = Path(__file__).parents[1] / "model"
AUTO_CLASSES = {
    "AutoConfig": "configuration_megabert.MegaBertConfig",
    "AutoModel": "modeling_megabert.MegaBertModel",
    "AutoModelForMaskedLM": "modeling_megabert.MegaBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_megabert.MegaBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_megabert.MegaBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_megabert.MegaBertForQuestionAnswering",
}
TOKENIZER_CLASS = (
    "PreTrainedTokenizerFast"  # without it in the config, pipelines of transformers < 4.57 load no tokenizer
)
VOCAB = "vocab.txt"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", VOCAB)

# The largest sizes that a config may ask for: ten times the largest encoders there are, and far below what would fill a memory.
LARGEST = {
    "vocab_size": 10_000_000,
    "hidden_size": 65_536,
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 100_000,
}


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write to, for the caller to rename; what is still there at the end is removed."""
    folder = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_config(folder: Path, config: MegaBertConfig) -> None:
    """config.json, and beside it the code that it names."""
    config.architectures = ["MegaBertForMaskedLM"]
    config.auto_map = dict(AUTO_CLASSES)
    config.tokenizer_class = TOKENIZER_CLASS
    config.save_pretrained(folder)
    for file in sorted(MODEL_CODE.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str) -> None:
    """model.safetensors, or several and an index where it would be larger. max_shard_size: such as 5GB."""
    pattern = SAFETENSORS.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, members in plan.filename_to_tensors.items():
        part = {member: weights[member].contiguous() for member in members}
        save_file(part, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / name)  # safetensors' own lets nobody else read it
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def copy_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """The tokenizer's files, and how long a text may be."""
    if source.is_file():  # a tokenizer.json by itself
        source = source.parent
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(_inside(source, name), folder / name)
    if not (folder / TOKENIZER).is_file() and (source / VOCAB).is_file():
        _from_vocab(source).save(str(folder / TOKENIZER))
    settings = read_json(source / TOKENIZER_CONFIG) if (source / TOKENIZER_CONFIG).is_file() else {}
    settings["model_max_length"] = max_length
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")


def read_tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a folder, or a tokenizer.json itself, cutting and padding nothing. Raises ValueError if there is none."""
    if path.is_dir() and not (path / TOKENIZER).is_file() and (path / VOCAB).is_file():
        return _from_vocab(path)
    return read_tokenizer(_inside(path, TOKENIZER) if path.is_dir() else path)


def _from_vocab(folder: Path) -> Tokenizer:
    """BERT's tokenizer from its vocab.txt."""
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    pieces = _inside(folder, VOCAB).read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if lacking := [piece for piece in ("[CLS]", "[SEP]") if piece not in vocabulary]:
        raise ValueError(
            f"{folder / VOCAB}: has no {' and no '.join(lacking)}; expected a BERT vocabulary, a piece per line."
        )
    lowercase = bool(settings.get("do_lower_case", True))
    tokenizer: Any = BertWordPieceTokenizer(vocabulary, lowercase=lowercase)
    return tokenizer._tokenizer


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
    """config.json, its sizes within reason. Raises ValueError naming the first that is not."""
    config = read_json(folder / CONFIG)
    for name, largest in LARGEST.items():
        size = config.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
            raise ValueError(f"{folder / CONFIG}: {name} is {size!r}, expected a number from 1 to {largest:,}.")
    return config


def check_code_stays_inside(folder: Path) -> None:
    """Raises ValueError unless every entry of auto_map is a class of a file in this very folder."""
    auto_map = read_config(folder).get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise ValueError(f"{folder / CONFIG}: auto_map is {auto_map!r}, expected an object.")
    for auto, entry in auto_map.items():
        module, _, name = entry.partition(".") if isinstance(entry, str) else ("", "", "")
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(f"{folder / CONFIG}: auto_map.{auto} is {entry!r}, expected module.Class of this folder.")
        _inside(folder, f"{module}.py")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's weights files, mapped from the disk where the format can. Raises ValueError if they are damaged."""
    weights: dict[str, Tensor] = {}
    for path in _weights_files(folder):
        part = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
        if twice := sorted(part.keys() & weights.keys()):
            raise ValueError(f"{path}: holds {twice[0]}, which another file holds too.")
        weights |= part
    return weights


def _weights_files(folder: Path) -> list[Path]:
    """safetensors before pickles, one file before several, as transformers chooses."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [_inside(folder, name)]
        if (folder / f"{name}.index.json").is_file():
            index = read_json(folder / f"{name}.index.json").get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
                raise ValueError(f"{folder / name}.index.json: has no weight_map from names to files.")
            return [_inside(folder, file, suffix=Path(name).suffix) for file in sorted(set(index.values()))]
    raise ValueError(f"{folder}: has no {SAFETENSORS} and no {PICKLED}, whole or in parts.")


def _inside(folder: Path, name: str, suffix: str = "") -> Path:
    """A file directly in the folder. Raises ValueError for a name that leads elsewhere, or a file that is not there."""
    if Path(name).name != name or name in (".", "..") or not name.endswith(suffix):
        raise ValueError(f"{folder}: names the file {name!r}, expected one directly in this folder.")
    path = folder / name
    # The hub's cache is made of links to ../../blobs; any other link out of the folder is not ours to follow.
    roots = {folder.resolve(), folder.resolve().parents[1] / "blobs"} if folder.resolve().parents[1:] else {folder}
    if path.is_file() and path.resolve().parent not in roots:
        raise ValueError(f"{path}: is a link to {path.resolve()}, outside its folder.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the folder names it.")
    return path


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
    except (UnpicklingError, RuntimeError, EOFError) as mistake:
        reason = str(mistake).strip().splitlines()[0] if str(mistake).strip() else type(mistake).__name__
        raise ValueError(f"{path}: is not a file of tensors alone, and was not read: {reason}") from mistake
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: holds something else than tensors by name.")
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} says it is {tuple(tensor.shape)}, more than the file holds.")
    return state
