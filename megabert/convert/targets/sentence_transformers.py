"""Write the target sentence-transformers: files that say how to make a text's embedding from the model's states."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megabert.convert.hf.reader import read_json
from megabert.convert.targets.programs.run import run_python
from megabert.convert.targets.target import (
    DiffersError,
    Expected,
    ExportedFolder,
    NotOpened,
    Proof,
    Target,
    largest_difference,
)
from megabert.data.shards.manifest import TOKENIZER_CONFIG
from megabert.files.json_file import parse_json, write_json
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.version import __version__

TOLERANCE = 1e-5
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
USAGE = """from sentence_transformers import SentenceTransformer
model = SentenceTransformer("this folder", trust_remote_code=True)
vectors = model.encode(["a text", "another text"])"""


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    return []


def write(exported: ExportedFolder, folder: Path) -> str:
    write_pooling(exported, folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": exported.max_length, "do_lower_case": False})
    settings = {"__version__": {}, "model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings | {"prompts": {}, "default_prompt_name": None})
    return f"megabert {__version__}"


def write_pooling(exported: ExportedFolder, folder: Path) -> None:
    """Write modules.json and 1_Pooling/config.json, which TEI reads too: the mean of all tokens' states."""
    write_json(folder / "modules.json", MODULES)
    pooling: dict[str, Any] = {"word_embedding_dimension": exported.config.hidden_size}
    pooling |= {f"pooling_mode_{name}": name == "mean_tokens" for name in POOLINGS} | {"include_prompt": True}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling/config.json", pooling)


def check_server_files(folder: Path, length: int) -> None:
    """Raise DiffersError unless servers cut texts at `length` tokens and take the mean of all tokens, as we do."""
    for name, setting in (("sentence_bert_config.json", "max_seq_length"), (TOKENIZER_CONFIG, "model_max_length")):
        if (got := read_json(folder / name).get(setting)) != length:
            raise DiffersError(f"{name}: {setting} is {got!r}, expected {length}")
    if not (modules := folder / "modules.json").is_file() or parse_json(modules.read_bytes()) != MODULES:
        raise DiffersError("modules.json is missing or names other modules than a transformer and its pooling")
    pooling = read_json(folder / "1_Pooling/config.json")
    chosen = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode_") and value)
    if chosen != ["pooling_mode_mean_tokens"]:
        raise DiffersError(
            f"1_Pooling/config.json pools by {', '.join(chosen) or 'nothing'}, expected the mean of all tokens"
        )


def prove(folder: Path, expected: Expected) -> Proof | NotOpened:
    """Compare the embeddings that the library gives, in a process without megabert, with means of the states."""
    if find_spec("sentence_transformers") is None:
        return NotOpened("sentence-transformers: pip install 'megabert[serving]'")
    answer = run_python("open_sentence_transformers.py", folder, expected.texts)
    what = f"embeddings of {len(expected.texts):,} texts"
    difference = largest_difference(np.load(answer.array), expected.pooled, TOLERANCE, what)
    return Proof("sentence-transformers", answer.version, difference, what)


TARGET = Target("sentence-transformers", check, write, prove, USAGE)
