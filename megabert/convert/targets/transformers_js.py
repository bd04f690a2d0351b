"""Write the target transformers.js: a folder with the graph, a config and a tokenizer as that library reads them."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megabert.convert.check.export_record import RECORD, token_of
from megabert.convert.hf.config import SHARED_SETTINGS
from megabert.convert.targets import onnx_graphs
from megabert.convert.targets.compared_texts import lines_with_ids
from megabert.convert.targets.js_normalizer import check_same_ids, to_js_tokenizer
from megabert.convert.targets.programs.run import HERE, run
from megabert.convert.targets.target import (
    DiffersError,
    Expected,
    ExportedFolder,
    NotOpened,
    Proof,
    Target,
    largest_difference,
)
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.files.disk import format_bytes
from megabert.files.json_file import read_json, write_json
from megabert.model.configuration_megabert import MegaBertConfig

FOLDER = "transformers.js"
PACKAGE = "@huggingface/transformers"
TOLERANCE = 1e-4
# The embeddings of this many texts are compared, one at a time.
TEXTS = 200
# A graph of 2 GB or more is split into several files, and the library needs their names.
MOST_BYTES = 1_900_000_000
USAGE = """import { pipeline } from '@huggingface/transformers';
const fill = await pipeline('fill-mask', 'this folder/transformers.js', { dtype: 'fp32' });
console.log(await fill('A text with a [MASK].'));"""


class Node(NamedTuple):
    """program: node; modules: the node_modules folder with the package."""

    program: str
    modules: Path
    version: str


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    onnx_graphs.check_head("transformers.js", config)
    layer = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    size = 4 * (config.vocab_size * config.hidden_size + config.num_hidden_layers * layer)
    if size > MOST_BYTES:
        raise ValueError(
            f"--for transformers.js: the graph would have {format_bytes(size)}, and the library reads one file of less "
            "than 2 GB. Leave transformers.js out."
        )
    return ["feature extraction computes the logits too, because one graph serves both pipelines; use dtype fp32"]


def write(exported: ExportedFolder, folder: Path) -> str:
    out = folder / FOLDER
    (out / "onnx").mkdir(parents=True)
    shutil.copyfile(folder / onnx_graphs.MASKED_LM, out / onnx_graphs.ENCODER)
    settings = {name: getattr(exported.config, name) for name in SHARED_SETTINGS}
    # The library chooses its classes by these two names; what is computed is in the graph.
    named = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    write_json(out / "config.json", named | settings)
    tokenizer = to_js_tokenizer(exported.tokenizer)
    check_same_ids(exported.tokenizer, tokenizer, lines_with_ids(folder))
    # Escapes would make a file of many scripts half as large again, and browsers download it.
    (out / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(folder / TOKENIZER_CONFIG, out / TOKENIZER_CONFIG)
    return f"torch {version('torch')}"


def prove(folder: Path, expected: Expected) -> Proof | NotOpened:
    """Compare ids, the best word for each [MASK], and embeddings with what the library gives under Node.js."""
    node = find_node()
    if node is None:
        return NotOpened(f"Node.js, and npm install {PACKAGE} in the folder where the command runs, or in NODE_PATH")
    lines, ids = zip(*lines_with_ids(folder), strict=True)
    longest = max(len(row) for row in expected.ids)
    texts = [row for row in range(TEXTS) if len(expected.ids[row]) < longest]
    mask, questions, answers = _questions(folder, expected)
    command = [node.program, str(HERE / "open_transformers_js.mjs"), str(node.modules)]
    answer = run(
        command, folder / FOLDER, [expected.texts[row] for row in texts], lines=list(lines), questions=questions
    )
    if wrong := [row for row, row_ids in enumerate(ids) if answer.ids[row] != row_ids]:
        row = wrong[0]
        raise DiffersError(
            f"{len(wrong):,} of {len(ids):,} lines have other ids, such as {lines[row][:60]!r}: "
            f"{answer.ids[row][:12]}, expected {ids[row][:12]}"
        )
    if answer.words != answers:
        raise DiffersError(f"for {mask} it answers {answer.words}, expected {answers}")
    what = f"embeddings of {len(texts)} texts"
    pooled = np.array(answer.rows, dtype=np.float32)
    difference = largest_difference(pooled, expected.pooled[texts], TOLERANCE, what)
    note = f"the ids of {len(ids):,} lines are equal"
    words = f"the first word for each of {len(answers)} {mask} is equal" if answers else "fill-mask was not compared"
    return Proof("transformers.js", node.version, difference, what, (note, words))


def find_node() -> Node | None:
    """Find Node.js, and the package in node_modules of this folder or those above it, or in NODE_PATH."""
    program = shutil.which("node")
    here = Path.cwd()
    places = [folder / "node_modules" for folder in (here, *here.parents)]
    places += [Path(part) for part in os.environ.get("NODE_PATH", "").split(os.pathsep) if part]
    found = [place for place in places if (place / PACKAGE / "package.json").is_file()]
    if program is None or not found:
        return None
    return Node(program, found[0], read_json(found[0] / PACKAGE / "package.json")["version"])


def _questions(folder: Path, expected: Expected) -> tuple[str, list[str], list[int]]:
    """Return the mask token, the export check's texts that have one, and the ids that the checkpoint puts there."""
    mask = token_of(read_json(folder / TOKENIZER_CONFIG), "mask")
    texts = read_json(folder / RECORD)["texts"]
    asked = [row for row, text in enumerate(texts) if mask and text.count(mask) == 1]
    ids, real = expected.inputs["input_ids"], expected.inputs["attention_mask"].astype(bool)
    number = {token["content"]: token["id"] for token in read_json(folder / TOKENIZER)["added_tokens"]}.get(mask)
    best = expected.inputs["logits"].argmax(axis=-1)
    answers = [int(best[(ids == number)[real] & (np.nonzero(real)[0] == row)][0]) for row in asked]
    return mask or "", [texts[row] for row in asked], answers


TARGET = Target(
    "transformers.js",
    check,
    write,
    prove,
    USAGE,
    language="js",
    packages=onnx_graphs.PACKAGES,
    extra="onnx",
    requires=("onnx",),
)
