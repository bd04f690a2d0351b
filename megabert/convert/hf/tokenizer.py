"""Read the tokenizer of a Hugging Face folder, tokenizer.json or vocab.txt, and write it into a MegaBERT folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from megabert.convert.hf.reader import check_inside, read_json
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import read_tokenizer, special_tokens
from megabert.data.shards.tokenizer_folder import (
    ADDED_TOKENS,
    FILES,
    SPECIAL_TOKENS_MAP,
    STABLE_CLASSES,
    VOCAB,
    find_class,
    find_new_names,
    read_folder_tokenizer,
    read_json_files,
    rename_special_tokens,
    special_token_names,
)
from megabert.files.bounded_reads import has_file
from megabert.files.json_file import write_json

# Pipelines of transformers before 4.57 load no tokenizer if the config does not name its class.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
TOKENS = (*(f"{role}_token" for role in SPECIAL_TOKENS), "bos_token", "eos_token", "additional_special_tokens",
          "extra_special_tokens", "added_tokens_decoder")  # fmt: skip
# Other settings of tokenizer_config.json, such as auto_map, are not copied, because they may name code to run.
CLASS = "tokenizer_class"
MAX_LENGTH = "model_max_length"
# Parts of tokenizer.json that say on which side, if tokenizer_config.json does not.
SIDES = {"truncation_side": "truncation", "padding_side": "padding"}
COPIED_SETTINGS = (CLASS, "do_lower_case", "strip_accents", "tokenize_chinese_chars", "padding_side",
                   "clean_up_tokenization_spaces", "truncation_side", "model_input_names", "add_prefix_space",
                   "split_special_tokens", *TOKENS)  # fmt: skip


def copy_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Write a tokenizer and its maximum length into `folder`.

    source: a folder, which may lack a tokenizer, or a tokenizer.json under any name. max_length: in tokens; the
    truncation and padding that tokenizer.json specifies are removed, but for their sides.
    """
    files = find_tokenizer_files(source)
    contents = read_json_files(files)
    if TOKENIZER in files or VOCAB in files:
        whole, renamed = _read_with_known_names(files)
        if renamed:
            # The other files have the old names.
            contents[TOKENIZER_CONFIG] = {
                name: value for name, value in contents[TOKENIZER_CONFIG].items() if name not in (*TOKENS, CLASS)
            }
            files = {name: path for name, path in files.items() if name in (TOKENIZER, TOKENIZER_CONFIG)}
        for name in (VOCAB, ADDED_TOKENS, SPECIAL_TOKENS_MAP):
            if name in files:
                shutil.copyfile(files[name], folder / name)
        if TOKENIZER in files and whole.to_str() == read_tokenizer(files[TOKENIZER]).to_str():
            _copy_without_limits(files[TOKENIZER], contents[TOKENIZER], folder / TOKENIZER)
        else:
            (folder / TOKENIZER).write_text(whole.to_str(), encoding="utf-8")
    limits = {side: contents[TOKENIZER].get(part) or {} for side, part in SIDES.items()}
    settings = {side: limit["direction"].lower() for side, limit in limits.items() if "direction" in limit}
    settings |= {name: value for name, value in contents[TOKENIZER_CONFIG].items() if name in COPIED_SETTINGS}
    name = settings.get(CLASS)
    if not _keeps_ids(name) or find_class(source if source.is_dir() else source.parent, settings) is None:
        settings[CLASS] = TOKENIZER_CLASS
    if (folder / TOKENIZER).is_file():
        tokenizer = read_tokenizer(folder / TOKENIZER)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {f"{role}_token": token for role, token in special_tokens(tokenizer).items() if token in vocabulary}
        settings = special | settings
    settings[MAX_LENGTH] = max_length
    write_json(folder / TOKENIZER_CONFIG, settings)


def read_max_length(source: Path, most: int) -> int:
    """Return at how many tokens a folder's tokenizer cuts a text, if it says so, and else `most`.

    most: the tokens that the model reads, which may be more than it was trained on.
    """
    path = source / TOKENIZER_CONFIG
    length = read_json(check_inside(source, TOKENIZER_CONFIG)).get(MAX_LENGTH) if has_file(path) else None
    return length if type(length) is int and 3 <= length <= most else most


def _keeps_ids(name: Any) -> bool:
    """Return whether this class gives the written tokenizer.json's ids, in every folder and version of transformers."""
    return isinstance(name, str) and name in STABLE_CLASSES and hasattr(transformers, name)


def find_tokenizer_files(source: Path) -> dict[str, Path]:
    """Map the name of each tokenizer file that exists to its path.

    source: a folder, or a tokenizer.json under any name, to which a tokenizer_config.json in its folder belongs only if
    the file is really called tokenizer.json. Raises ValueError if one is a link to a place outside the folder.
    """
    if source.is_dir():
        return {name: check_inside(source, name) for name in FILES if has_file(source / name)}
    config = source.with_name(TOKENIZER_CONFIG)
    has_config = source.name == TOKENIZER and has_file(config)
    return {TOKENIZER: source} | (
        {TOKENIZER_CONFIG: check_inside(source.parent, TOKENIZER_CONFIG)} if has_config else {}
    )


def read_hf_tokenizer(source: Path) -> Tokenizer:
    """Load the tokenizer of a folder, or a tokenizer.json, without truncation and padding.

    Raises ValueError if there is none or it cannot be read.
    """
    files = find_tokenizer_files(source)
    if TOKENIZER not in files and VOCAB not in files:
        # The file does not exist, and this raises the error that says so.
        return read_tokenizer(check_inside(source, TOKENIZER))
    return _read_with_known_names(files)[0]


def _read_with_known_names(files: dict[str, Path]) -> tuple[Tokenizer, bool]:
    """Load a tokenizer. If its special tokens have names that MegaBERT does not know, they get BERT's.

    files: as find_tokenizer_files() returns them. Returns it, and whether tokens were renamed.
    """
    tokenizer = read_folder_tokenizer(files)
    if _has_all_of_berts(tokenizer) or not find_new_names(tokenizer, roles := special_token_names(files)):
        return tokenizer, False
    renamed = rename_special_tokens(tokenizer, roles)
    return (renamed, True) if _has_all_of_berts(renamed) else (tokenizer, False)


def _has_all_of_berts(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.token_to_id(token) is not None for token in SPECIAL_TOKENS.values())


def has_tokenizer(source: Path) -> bool:
    return any(has_file(source / name) for name in (TOKENIZER, VOCAB))


def _copy_without_limits(source: Path, raw: dict[str, Any], copy: Path) -> None:
    """Copy a tokenizer.json, whose content is raw, without its truncation and padding."""
    if raw.get("truncation") is None and raw.get("padding") is None:
        shutil.copyfile(source, copy)
    else:
        copy.write_text(json.dumps(raw | {"truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")
