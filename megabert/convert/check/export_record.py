"""Write and read export.json of an exported folder: its files' and parameters' hashes, and what its check measured."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from megabert.convert.hf.reader import read_json
from megabert.data.shards.manifest import TOKENIZER_CONFIG
from megabert.files.checkpoint_format import files_of
from megabert.files.hashing import file_sha256
from megabert.files.json_file import check_format_version, write_json

RECORD = "export.json"
# Version of export.json. Exports without a version are older.
FORMAT_VERSION = 1
# The record of an import, see folder_record.py.
IMPORT_RECORD = "import.json"
EDITABLE_FILES = {RECORD, IMPORT_RECORD, "README.md"}

# Tolerance of fp32 logits, relative to the largest one if that is above 1.
TOLERANCE = 1e-5

# Real sentences of different lengths, with what tokenizers treat differently: case, accents, other scripts, numbers,
# spaces, and the mask token. The third has more tokens than ModernBERT's window of 128, of which 64 are on one side.
CHECK_TEXTS = (
    "Return a new array of given shape and type, filled with zeros.",
    "The optimizer's learning rate.",
    "If the file does not exist, an error is raised; otherwise its contents are read line by line, decoded as UTF-8, "
    "and passed to the function, which must not modify them. Lines that begin with a number sign are comments. A line "
    "that ends with a backslash continues on the next one, and spaces at its beginning are removed. Values are "
    "numbers, dates or texts; a text is quoted if it contains a comma, and a date has the year first. Names may "
    "contain letters, digits and the sign for a minus, in any order, but must not begin with a digit. Whatever is left "
    "at the end of the file is returned as one list, in the order in which it was read.",
    "The [MASK] of M\u00fcnchen is na\u00efve:  3.14 \u2264 \u03c0? \u6771\u4eac, don't_stop\u2028(e-mail) \U0001f600!",
)
# The second texts of the pairs, for a model that reads pairs.
CHECK_PAIRS = CHECK_TEXTS[::-1]


def check_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Return the texts of a folder's check and the second texts of pairs, with its tokenizer's own mask token."""
    mask = token_of(read_json(folder / TOKENIZER_CONFIG), "mask") or "[MASK]"
    first, second = ([text.replace("[MASK]", mask) for text in texts] for texts in (CHECK_TEXTS, CHECK_PAIRS))
    return first, second


def token_of(settings: Mapping[str, Any], role: str) -> str | None:
    """Return a special token of tokenizer_config.json, where it may be a string or an object. role: such as "pad"."""
    token = settings.get(f"{role}_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


class Measurements(TypedDict):
    """What the export check measured: differences of logits, the largest logit, and the version of transformers.

    reused: nothing was exported, because the folder is an unchanged export of the same checkpoint.
    """

    max_difference: float
    largest_logit: float
    transformers: str
    reused: NotRequired[bool]


def write_export_record(
    folder: Path,
    checkpoint: str,
    max_length: int,
    parameters: dict[str, Tensor],
    pairs: bool | None = None,
    head: str = "MaskedLM",
    initialized: Sequence[str] = (),
) -> None:
    """Write export.json, before the check. The folder must have its tokenizer.

    checkpoint: fingerprint of what was exported; max_length: tokens at which the check truncates texts; parameters: by
    their names in the folder; pairs: whether a classifier of texts reads pairs, else None; head: of the model, as the
    names of transformers' auto classes end; initialized: our names of parameters that nothing has trained.
    """
    texts, second_texts = check_texts(folder)
    classifier = {"classifies": "pairs" if pairs else "texts", "text_pairs": second_texts if pairs else None}
    record = {
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint,
        "tolerance": TOLERANCE,
        "texts": texts,
        "max_length": max_length,
        **({} if pairs is None else classifier),
        **({} if head == "MaskedLM" else {"head": head}),
        **({"initialized": list(initialized)} if initialized else {}),
        "files": _hash_files(folder),
        "parameters": {name: hashlib.sha256(tensor.numpy().data).hexdigest() for name, tensor in parameters.items()},
    }
    write_json(folder / RECORD, record)


def add_measurements(folder: Path, measured: Measurements) -> None:
    _add(folder, {"measured": measured})


def add_targets(folder: Path, outcomes: Mapping[str, object]) -> None:
    """Record what became of each target, and the hashes of the files that they added."""
    _add(folder, {"targets": outcomes, "files": _hash_files(folder)})


def _add(folder: Path, more: dict[str, Any]) -> None:
    record = read_json(folder / RECORD) | more
    write_json(folder / RECORD, record)


def _hash_files(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in files_of(folder) if name not in EDITABLE_FILES}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read export.json of any version, or return None if there is none or another program wrote it."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_json(folder / RECORD)
    except ValueError:
        return None
    hashes = [record.get("files"), record.get("parameters")]
    valid = all(isinstance(part, dict) and all(isinstance(digest, str) for digest in part.values()) for part in hashes)
    return record if valid and isinstance(record.get("checkpoint"), str) else None


def check_version(folder: Path, record: dict[str, Any]) -> None:
    """Raise ValueError unless this version of MegaBERT can verify the export."""
    if "format_version" not in record:
        raise ValueError(
            f"{folder}: was exported by an older version of MegaBERT, which recorded less. Export it again."
        )
    check_format_version(folder / RECORD, record, FORMAT_VERSION, "Update MegaBERT.")


def find_added_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """List the files in the folder that the export or import did not write."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return sorted(files - record["files"].keys() - EDITABLE_FILES)


def find_change(folder: Path, record: Mapping[str, Any], added: bool = True) -> str | None:
    """Compare every file with its hash. Returns what is wrong with the first that differs, or None.

    added: also report files that the record does not list.
    """
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            return f"{folder / name}: is missing; it was there when the folder was written"
        if file_sha256(folder / name) != digest:
            return f"{folder / name}: was changed since the folder was written"
    # Downloads add files such as .cache/huggingface and .gitattributes, which nothing loads.
    found = [name for name in find_added_files(folder, record) if not name.startswith(".")] if added else []
    return f"{folder / found[0]}: was added since the folder was written" if found else None
