"""Write the task parameter-type: is a parameter that a docstring describes of this type?

The texts are a type (bool, int, str, ...) and a parameter's name with the first sentence of its description. Each
parameter is a positive with its own type, and a negative with the type of another parameter of the same docstring, and
the other way round. So every text and every type is as often in a positive as in a negative: only a model that knows
which descriptions go with which types, such as "Whether to ..." with bool, is better than chance.
"""

import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import docstring_parser

from data_prep.tasks.held_out import hash_fraction, read_documents
from data_prep.tasks.tsv import Row, write_splits

# Frequent spellings of frequent types. Parameters of other types are left out.
TYPES = {
    "bool": ("bool", "boolean"),
    "int": ("int", "integer"),
    "float": ("float",),
    "str": ("str", "string"),
    "list": ("list",),
    "tuple": ("tuple",),
    "dict": ("dict",),
    "callable": ("callable", "function"),
    "array": ("array_like", "array-like", "ndarray", "numpy.ndarray", "np.ndarray", "tensor", "torch.tensor"),
}
TYPE_OF_SPELLING = {spelling: name for name, spellings in TYPES.items() for spelling in spellings}
# Quotes and brackets around a type, and what may follow its name: "`str`, optional", "list[int]", "int or None".
QUOTES = re.compile(r"[`'\"(){}~:]")
END_OF_NAME = re.compile(r"[,\[\s]")
HAS_PARAMETERS = re.compile(r"^\s*(Parameters|Args|Arguments|Params)\b", re.MULTILINE)
# A description of a parameter has at least and at most this many words.
MIN_WORDS, MAX_WORDS = 3, 30
HELD_OUT_SHARE = 0.25


class Parameter(NamedTuple):
    type: str
    text: str
    """the name and the first sentence of the description"""


def write_task(texts: Path, folder: Path) -> None:
    """Write train.tsv and dev.tsv to folder/parameter-type.

    texts: folder of text shards. The task has parameters of the held-out documents that no other document describes in
    the same words. Raises ValueError if there are none.
    """
    known = {found.text for text in read_documents(texts, "train") for found in parameters(text)}
    found = list(rows(read_documents(texts, "heldout"), known))
    if len({row.held_out for row in found}) < 2:
        raise ValueError(
            f"{texts}: its held-out documents describe too few parameters with types. Write the shards with "
            "--source docstrings --heldout 0.3 --replace."
        )
    write_splits(folder / "parameter-type", ("type", "parameter"), found)


def rows(documents: Iterable[str], known: Set[str]) -> Iterator[Row]:
    """Yield labelled pairs. A text in `known`, or that an earlier document has too, is left out."""
    used = set(known)
    for document in documents:
        left = {found.text: found for found in parameters(document) if found.text not in used}
        used |= left.keys()
        is_dev = hash_fraction(document) < HELD_OUT_SHARE
        for one, two in pairs(sorted(left.values(), key=lambda found: hash_fraction(found.text))):
            for parameter, other in ((one, two), (two, one)):
                yield Row((parameter.type, parameter.text), "fits", is_dev)
                yield Row((other.type, parameter.text), "other", is_dev)


def pairs(left: list[Parameter]) -> Iterator[tuple[Parameter, Parameter]]:
    """Yield pairs of parameters with different types; each parameter is in at most one."""
    left = list(left)
    while left:
        one = left.pop(0)
        two = next((found for found in left if found.type != one.type), None)
        if two is not None:
            left.remove(two)
            yield one, two


def parameters(document: str) -> Iterator[Parameter]:
    """Yield the parameters with a known type and a description of a suitable length."""
    if not HAS_PARAMETERS.search(document):
        # Parsing all docstrings would take ten times as long.
        return
    try:
        found = docstring_parser.parse(document).params
    except docstring_parser.ParseError:
        return
    for parameter in found:
        name = TYPE_OF_SPELLING.get(END_OF_NAME.split(QUOTES.sub("", parameter.type_name or "").strip())[0].lower())
        sentence = re.split(r"(?<=\.)\s", " ".join((parameter.description or "").split()))[0]
        if name and MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
            yield Parameter(name, f"{parameter.arg_name.strip('*').replace('_', ' ')}: {sentence}")
