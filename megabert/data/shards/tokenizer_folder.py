"""Read the tokenizer of a folder of transformers: tokenizer.json or vocab.txt, and the tokens beside them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import WordPiece

from megabert.data.shards.manifest import MAX_TOKENIZER_BYTES, TOKENIZER, TOKENIZER_CONFIG
from megabert.data.shards.sample_format import KEPT_NAMES, SPECIAL_TOKENS
from megabert.data.shards.tokenizer import read_tokenizer, special_tokens
from megabert.files.bounded_reads import read_bounded
from megabert.files.json_file import parse_json
from megabert.process.error_text import one_line

VOCAB = "vocab.txt"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG, VOCAB, ADDED_TOKENS, SPECIAL_TOKENS_MAP)
TOKEN_FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}
# These classes load a tokenizer.json as it is.
PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
# These split a text as BERT's own class does, by vocab.txt. Others with a vocab.txt (BertJapanese, RoFormer, Bertweet,
# ESM) do not.
BERTS = "Bert ConvBert DistilBert Electra LayoutLM Lxmert MobileBert RetriBert Splinter SqueezeBert"
BERT_CLASSES = {f"{name}Tokenizer{fast}" for name in BERTS.split() for fast in ("", "Fast")}
# transformers loads the tokenizer.json of any class but PLAIN_CLASSES, since its classes make some parts of a tokenizer
# anew: BERT's the normalizer and the special tokens around a text, RoBERTa's the space before it, XLM-RoBERTa's all. A
# class that it lacks leaves tokenizer.json as it is. STABLE_CLASSES give a tokenizer.json that transformers has loaded
# and saved the same ids in every version.
OTHERS = "MPNet Funnel Roberta Longformer Bart LED Mvp Deberta Luke GPT2 Blenderbot"
STABLE_CLASSES = {*PLAIN_CLASSES, *BERT_CLASSES}
STABLE_CLASSES |= {f"{name}Tokenizer{fast}" for name in OTHERS.split() for fast in ("", "Fast")}
# With this model, tokenizer.json is loaded as it is, whatever class is named.
PLAIN_MODEL = "modernbert"
# Unicode's property White_Space.
WHITE_SPACE = "".join(
    map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)
# The texts that other tokenizers have for BERT's special tokens. A token that is taken by an earlier role is not taken
# again: some tokenizers have one for padding and for the end.
OTHER_NAMES = {"cls": "<s>", "sep": "</s>", "mask": "<mask>", "unk": "<unk>", "pad": "<pad>"}
INSTEAD = {"cls": "bos", "sep": "eos"}
# The score of special tokens in a unigram model, lower than that of any other segmentation of their names. A far lower
# one would cost the scores of other pieces their last digits.
SPECIAL_SCORE = -1e4


def read_folder_tokenizer(files: dict[str, Path], lowercase: bool = True) -> Tokenizer:
    """Load the tokenizer of a folder with the ids that transformers gives, without truncation and padding.

    files: the path of each file of FILES that exists, with a tokenizer.json or a vocab.txt among them. lowercase:
    whether a vocab.txt folds case if tokenizer_config.json does not say. Raises ValueError if a file is malformed.
    """
    contents = read_json_files(files)
    path = files.get(TOKENIZER) or files[VOCAB]
    settings = contents[TOKENIZER_CONFIG]
    if "added_tokens_decoder" not in settings:
        settings = settings | contents[SPECIAL_TOKENS_MAP]
    if TOKENIZER in files:
        tokenizer = read_tokenizer(path)
        name = find_class(path.parent, settings)
        if name and name not in PLAIN_CLASSES and path.name == TOKENIZER and _has_class(name):
            tokenizer = _read_with_class(path, name, type(tokenizer.model).__name__)
    elif not is_berts(files):
        name = str(find_class(path.parent, settings))
        raise ValueError(
            f"{path}: its class, by {TOKENIZER_CONFIG} or config.json beside it, is {name}, whose splitting or special "
            f"tokens are not BERT's. {_explain_class(name)}"
        )
    else:
        tokenizer = _from_vocab(path, settings, lowercase)
    _add_tokens(path, tokenizer, _parse_added_tokens(path.parent, settings, contents[ADDED_TOKENS]))
    # As in read_tokenizer(), a "[MASK]" in a text stays text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def is_berts(files: dict[str, Path]) -> bool:
    """Return whether the tokenizer of a vocab.txt is one of BERT's, as far as its settings and the model say."""
    name = find_class(files[VOCAB].parent, read_json_files(files)[TOKENIZER_CONFIG])
    return name in PLAIN_CLASSES or name in BERT_CLASSES


def special_token_names(files: dict[str, Path]) -> dict[str, str]:
    """Return the texts of the tokens that the folder gives a role: {"cls": "<s>", "bos": "<s>", ...}."""
    contents = read_json_files(files)
    settings = contents[SPECIAL_TOKENS_MAP] | contents[TOKENIZER_CONFIG]
    found = {role: settings.get(f"{role}_token") for role in (*SPECIAL_TOKENS, "bos", "eos")}
    folder = next(iter(files.values())).parent
    return {role: _parse_token(folder, token).content for role, token in found.items() if token}


def read_json_files(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Map the name of each JSON file to its content, which is empty if there is no such file."""
    return {name: _read_object(files[name]) if name in files else {} for name in FILES if name != VOCAB}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_bounded(path, MAX_TOKENIZER_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: contains a {type(value).__name__}, expected an object.")
    if not isinstance(name := value.get("tokenizer_class"), str | None):
        raise ValueError(f"{path}: tokenizer_class is a {type(name).__name__}, expected a text.")
    return value


def _explain_class(name: str) -> str:
    if name.removesuffix("Fast") in ("FunnelTokenizer", "MPNetTokenizer"):
        return f"{name}.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers writes {TOKENIZER} for it."
    return (
        f"For the weights alone, remove {VOCAB} from a copy of the folder; if it is BERT's after all, set "
        f"tokenizer_class to BertTokenizer in the {TOKENIZER_CONFIG} beside it, and pass the folder."
    )


def find_class(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the class with which transformers loads a tokenizer, as its settings and the model beside it say."""
    path = folder / "config.json"
    config = _read_object(path) if path.is_file() else {}
    if (kind := config.get("model_type")) == PLAIN_MODEL:
        return None
    return settings.get("tokenizer_class") or config.get("tokenizer_class") or _class_of_model(kind)


def _class_of_model(kind: Any) -> str | None:
    """Return transformers' class for the tokenizer of a model_type, or None for one that it does not know."""
    if not isinstance(kind, str):
        return None
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    names: Any = TOKENIZER_MAPPING_NAMES.get(kind)
    # transformers 4 has a pair of classes, of which one may be missing. It loads the second, if it can.
    return next(filter(None, reversed(names)), None) if isinstance(names, tuple) else names


def _has_class(name: str) -> bool:
    import transformers

    return any(hasattr(transformers, spelling) for spelling in (name, name.removesuffix("Fast")))


def load_with_transformers(folder: Path) -> Any:
    """Load a folder's tokenizer with transformers' class of it, which must have tokenizers' Rust object.

    Raises ValueError, whose text lacks the folder.
    """
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        loaded.backend_tokenizer.no_truncation()
        loaded.backend_tokenizer.no_padding()
    except (OSError, ValueError, KeyError, AttributeError, ImportError, TypeError, UnboundLocalError) as error:
        raise ValueError(f"transformers cannot load it: {one_line(error)[:300]}") from error
    splitter: Any = loaded.backend_tokenizer.model
    if isinstance(splitter, WordPiece) and splitter.token_to_id(splitter.unk_token) is None:
        # The library raises an Exception at the first word that the vocabulary lacks.
        raise ValueError(f"the vocabulary lacks {splitter.unk_token}, the unknown token of {type(loaded).__name__}")
    return loaded


def _read_with_class(path: Path, name: str, model: str) -> Tokenizer:
    """Load a tokenizer.json with a class of transformers. model: the file's, such as WordPiece."""
    settings = path.parent / TOKENIZER_CONFIG
    as_it_is = f"To take the file as it is, set tokenizer_class to PreTrainedTokenizerFast in {settings}."
    try:
        tokenizer = Tokenizer.from_str(load_with_transformers(path.parent).backend_tokenizer.to_str())
    except ValueError as error:
        raise ValueError(f"{path}: its class is {name}, but {error}. {as_it_is}") from error
    # transformers 5 gives the vocabulary to the class's own model; transformers 4 kept the file's.
    if (got := type(tokenizer.model).__name__) != model:
        raise ValueError(f"{path}: splits by {model}, but its class {name} by {got}, so ids would change. {as_it_is}")
    return tokenizer


def _from_vocab(vocab: Path, settings: dict[str, Any], lowercase: bool) -> Tokenizer:
    """Make BERT's tokenizer from vocab.txt, as transformers' BertTokenizerFast does."""
    folder, vocabulary = vocab.parent, _read_vocab(vocab)
    special: Any = {
        f"{role}_token": _parse_token(folder, settings.get(f"{role}_token") or token)
        for role, token in SPECIAL_TOKENS.items()
    }
    required = [special[f"{role}_token"].content for role in ("cls", "sep", "unk")]
    if missing := [token for token in required if token not in vocabulary]:
        raise ValueError(f"{vocab}: has no {' and no '.join(missing)}; expected a BERT vocabulary, a token per line.")
    bert: Any = BertWordPieceTokenizer(
        vocabulary,
        handle_chinese_chars=_parse_flag(folder, settings, "tokenize_chinese_chars", True),
        strip_accents=_parse_flag(folder, settings, "strip_accents", None),
        lowercase=_parse_flag(folder, settings, "do_lower_case", lowercase),
        **special,
    )
    return bert._tokenizer


def _add_tokens(path: Path, tokenizer: Tokenizer, tokens: list[tuple[int | None, AddedToken]]) -> None:
    """Add the tokens that the tokenizer lacks. path: of its vocabulary. Raises ValueError if one gets another id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for number, token in tokens:
        if path.name == VOCAB or token.content not in vocabulary:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if number is not None and (got := tokenizer.token_to_id(token.content)) != number:
            raise ValueError(
                f"{path.parent}: its added token {token.content!r} has the id {number}, but {path.name} makes it {got}."
            )


def _read_vocab(path: Path) -> dict[str, int]:
    """Read a piece per line, in the order of the ids, without white space at the ends of lines, as transformers 5 does.

    Unlike there, a byte order mark is no part of the first piece, which is [PAD] as a rule.
    Raises ValueError if a piece is listed twice, but for lines of white space alone: no text contains their piece.
    """
    try:
        # splitlines() would split at U+2028 and U+0085, which occur in tokens.
        text = read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error
    pieces = [piece.rstrip(WHITE_SPACE) for piece in text.removesuffix("\n").split("\n")]
    ids = {piece: number for number, piece in enumerate(pieces)}
    if duplicate := next((piece for number, piece in enumerate(pieces) if piece and ids[piece] != number), None):
        raise ValueError(f"{path}: lists {duplicate!r} twice, expected a vocabulary of one piece per line.")
    return ids


def _parse_added_tokens(
    folder: Path, settings: dict[str, Any], legacy: dict[str, Any]
) -> list[tuple[int | None, AddedToken]]:
    """List the tokens that are added to vocab.txt: those with an id by id, then those that need none.

    legacy: added_tokens.json, which is used if the settings have no added_tokens_decoder.
    """
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        # Tokens with names of their own: {"image_token": "<image>"}.
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise ValueError(f"{folder}: additional_special_tokens is a {type(extra).__name__}, expected a list.")
    without_id = [_parse_token(folder, token) for token in extra]
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        special = {token.content for token in without_id} | set(SPECIAL_TOKENS.values())
        listed = {
            str(number): {"content": content, "special": content in special, "normalized": content not in special}
            for content, number in legacy.items()
        }
    if not isinstance(listed, dict) or not all(str(number).isdecimal() for number in listed):
        raise ValueError(f"{folder}: added_tokens_decoder or {ADDED_TOKENS} is not an object of tokens with their ids.")
    with_id = [(int(number), _parse_token(folder, token)) for number, token in listed.items()]
    return [*sorted(with_id, key=lambda item: item[0]), *((None, token) for token in without_id)]


def _parse_token(folder: Path, value: Any) -> AddedToken:
    """Parse a token that is written as its text, which makes it a special token, or as an object."""
    fields = {"content": value, "normalized": False} if isinstance(value, str) else value
    if isinstance(fields, dict):
        flags = {"special": True} | {name: flag for name, flag in fields.items() if name not in ("content", "__type")}
        content = fields.get("content")
        if (
            isinstance(content, str)
            and flags.keys() <= TOKEN_FLAGS
            and all(flag in (True, False) for flag in flags.values())
        ):
            return AddedToken(content, **flags)
    raise ValueError(f"{folder}: {value!r} is not a token, expected its text or an object with its content.")


def _parse_flag(folder: Path, settings: dict[str, Any], name: str, default: bool | None) -> Any:
    value = settings.get(name, default)
    if not isinstance(value, bool) and value is not None:
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: {name} is {value!r}, expected true or false.")
    return default if value is None else value


def rename_special_tokens(tokenizer: Tokenizer, roles: dict[str, str]) -> Tokenizer:
    """Give the tokens with the roles of BERT's special tokens their names, as find_new_names() says.

    Ids stay, and so do flags, such as lstrip. No text contains a special token, whatever its name.
    """
    names = find_new_names(tokenizer, roles)
    kept = SPECIAL_TOKENS if names else special_tokens(tokenizer)
    return _change_tokens(tokenizer, names, set(kept.values()))


def find_new_names(tokenizer: Tokenizer, roles: dict[str, str]) -> dict[str, str]:
    """Return BERT's names for the special tokens of other names that have their roles.

    A tokenizer with all of Gemma's or RoBERTa's special tokens keeps their names. roles: their texts, as far as they
    are known; what the tokenizer itself puts around a text counts more, and OTHER_NAMES are tried too.
    """
    roles = roles | _find_ends(tokenizer)
    kept = special_tokens(tokenizer)
    if kept in KEPT_NAMES and _has_roles(kept, roles):
        return {}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names: dict[str, str] = {}
    for role, usual in OTHER_NAMES.items():
        tried = (roles.get(role), roles.get(INSTEAD.get(role, "")), usual)
        found = next((text for text in tried if text in special and text not in names), None)
        if found is not None and tokenizer.token_to_id(SPECIAL_TOKENS[role]) is None:
            names[found] = SPECIAL_TOKENS[role]
    return names


def _find_ends(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens that the tokenizer puts before and after a text, if it is one each."""
    around = tokenizer.encode("", add_special_tokens=True).tokens
    return dict(zip(("cls", "sep"), around, strict=True)) if len(around) == 2 else {}


def _has_roles(names: dict[str, str], roles: dict[str, str]) -> bool:
    """Return whether a folder gives these tokens the roles that their names say, as far as it gives roles."""
    for role, token in names.items():
        given = roles.get(role) or roles.get(INSTEAD.get(role, ""))
        if given and token != given:
            return False
    return True


def _change_tokens(tokenizer: Tokenizer, names: dict[str, str], special: set[str]) -> Tokenizer:
    """Rename tokens everywhere, and let no text contain the special ones, as transformers loads them."""
    raw = json.loads(tokenizer.to_str())
    before, model = json.dumps(raw), raw["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:
        named = ((names.get(text, text), score) for text, score in model["vocab"])
        model["vocab"] = [[text, min(score, SPECIAL_SCORE) if text in special else score] for text, score in named]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in raw["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["special"] |= token["content"] in special
    raw["post_processor"] = _rename(raw["post_processor"], names)
    if json.dumps(raw) == before:
        return tokenizer
    changed = Tokenizer.from_str(json.dumps(raw))
    changed.encode_special_tokens = tokenizer.encode_special_tokens
    return changed


def _rename(value: Any, names: dict[str, str]) -> Any:
    """Rename the tokens that a post-processor names, in its keys too."""
    if isinstance(value, dict):
        return {names.get(key, key): _rename(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_rename(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value
