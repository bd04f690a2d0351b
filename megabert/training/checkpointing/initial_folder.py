"""Check the folder of initial weights, or the vocabulary of a checkpoint, before it is loaded; imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.source import Corpus, Source
from megabert.data.shards.tokenizer import read_tokenizer
from megabert.files.checkpoint_format import has_checkpoint
from megabert.files.hashing import file_sha256
from megabert.files.json_file import read_json

CONFIG = "config.json"
MODEL_TYPE = "megabert"
# Settings of the architecture, which the recipe calls by the same names. Most change the output but no tensor's shape.
SAME_SETTINGS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "position", "rope_theta",
    "local_rope_theta", "norm_position", "bias", "norm_bias", "type_vocab_size", "global_attention_every",
    "local_attention_window", "ffn", "layer_norm_eps", "position_offset", "embedding_neighbors",
)  # fmt: skip
# Settings that folders of older versions lack, with the values that their models have: MegaBertConfig's defaults.
LATER_SETTINGS = {"position_offset": 0, "embedding_neighbors": 0}


def check_folder(folder: Path) -> dict[str, Any]:
    """Return its config.json, with the settings that an older version did not write.

    Raises ValueError unless launch/convert_from_hf.py or convert_to_hf.py wrote it.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model.init_from {folder}: is not a MegaBERT folder. {_how_to_convert(folder)}")
    return LATER_SETTINGS | config


def _how_to_convert(folder: Path) -> str:
    if has_checkpoint(folder):
        return (
            "It is a run or a checkpoint: run.branch_from continues it, and launch/convert_to_hf.py (for a bert or "
            "modernbert recipe then launch/convert_from_hf.py) makes a folder for init_from."
        )
    if not (folder / CONFIG).is_file():
        return f"It has no {CONFIG}; expected the folder of a model."
    return "Convert it with launch/convert_from_hf.py first."


def check_settings(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ValueError, naming all of them, if settings of the folder's model in `theirs` are others in this recipe.

    A folder has no token types if its type_vocab_size is 0, and a recipe if model.token_types is false.
    """
    different = [name for name in SAME_SETTINGS if name in theirs and theirs[name] != ours[name]]
    if not different:
        return
    found = "; ".join(
        f"{name} is {theirs[name]!r} in its {CONFIG}, {ours[name]!r} in this recipe" for name in different
    )
    wanted = {name: theirs[name] for name in different}
    if "type_vocab_size" in wanted and 0 in (types := (theirs["type_vocab_size"], ours["type_vocab_size"])):
        wanted["token_types"] = types[0] > 0
        if not types[0]:
            del wanted["type_vocab_size"]
    wanted = {name: value if isinstance(value, str) else json.dumps(value) for name, value in wanted.items()}
    name, value = next(iter(wanted.items()))
    remedy = f"Set model.{name} to {value}."
    if len(wanted) > 1:
        remedy = f"Pass {' '.join(f'--model.{name}={value}' for name, value in wanted.items())}."
    raise ValueError(f"model.init_from {folder}: {found}. {remedy}")


def check_vocabulary(folder: Path, source: Source) -> None:
    """Raise ValueError if an id would stand for another token than the one its embedding was trained for."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"model.init_from {folder}: has no {TOKENIZER} to compare with the shards' tokenizer. Give it the one that "
            "it was trained with: launch/convert_from_hf.py --tokenizer."
        )
    if difference := find_difference(path, source):
        raise ValueError(
            f"model.init_from {folder}: {difference}. Write shards with the folder's tokenizer, or give the folder the "
            "shards' tokenizer with launch/convert_from_hf.py --tokenizer."
        )


def check_vocabulary_of_checkpoint(path: Path, corpus: Corpus) -> None:
    """Raise ValueError if an id of the corpus stands for another token than in the checkpoint.

    The corpus's fingerprint is of its ids. Shards of another tokenizer may have the same: one with more tokens, say.
    """
    file = path / TOKENIZER
    if file.is_file() and (difference := find_difference(file, corpus.sources[0])):
        raise ValueError(f"{path}: {difference}. Write the shards with the checkpoint's {TOKENIZER}.")


def find_difference(path: Path, source: Source) -> str | None:
    """Compare the vocabularies of a tokenizer.json and of shards. Returns the first difference, or None."""
    if file_sha256(path) == source.tokenizer.fingerprint:
        return None
    ids = read_tokenizer(path).get_vocab()
    shard_ids = Tokenizer.from_buffer(source.read_tokenizer_file()).get_vocab()
    if ids == shard_ids:
        return None
    token = min(ids.items() ^ shard_ids.items(), key=lambda item: (item[1], item[0]))[0]
    return f"its tokenizer has {token!r} as id {ids.get(token)}, the shards' has it as id {shard_ids.get(token)}"
