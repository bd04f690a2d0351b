"""Tokenizers: every damage of a tokenizer.json raises one ValueError that names the file, and prints nothing else."""

import json
import random
from typing import Any

import pytest

from megabert.data.shards.tokenizer import find_tokenizer, parse_tokenizer

VALUES = [None, True, 0, -1, 1e300, 2**63, "", "x", "\0", [], {}, [[]], "AAAA", [["a", "b"]]]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 9)) if isinstance(value, list) else []
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def damaged(raw: dict, rng: random.Random) -> dict:
    raw = json.loads(json.dumps(raw))
    path = rng.choice(places(raw)[1:])
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    if rng.random() < 0.2:
        del inner[path[-1]]
    elif isinstance(old, str) and len(old) > 1000:
        inner[path[-1]] = old[: rng.randrange(len(old))]
    else:
        inner[path[-1]] = rng.choice(VALUES)
    return raw


def test_a_damaged_tokenizer_is_one_line(corpus, capfd):
    raw = json.loads((corpus.tokenizer / "tokenizer.json").read_text())
    raw["model"]["vocab"] = raw["model"]["vocab"][:60]
    rng = random.Random(0)
    refused = []
    for _ in range(300):
        data = json.dumps(damaged(raw, rng)).encode()
        try:
            parse_tokenizer(data, "here")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert [line for line in refused if not line.startswith("here: ") or len(line.splitlines()) > 1] == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change", [lambda raw: raw["normalizer"]["normalizers"][2].clear(),
                                    lambda raw: raw["post_processor"]["special_tokens"].clear()])  # fmt: skip
def test_what_makes_the_library_panic_is_one_line(corpus, tmp_path, capfd, change):
    raw = json.loads((corpus.tokenizer / "tokenizer.json").read_text())
    change(raw)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: the tokenizers library cannot read it: .*Fetch or write it"
    ):
        find_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("cut", [0, 1, 10, 1000, -1])
def test_a_cut_tokenizer_is_named(corpus, tmp_path, cut):
    (tmp_path / "tokenizer.json").write_bytes((corpus.tokenizer / "tokenizer.json").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"tokenizer\.json: not valid JSON"):
        find_tokenizer(tmp_path)
