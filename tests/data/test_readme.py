"""The worked example of megabert/data/README.md is what the code computes."""

from pathlib import Path

import numpy as np

from megabert.data.batch import Bin, Shapes, lay_out
from megabert.data.chunk_pieces import PieceOptions, cut_chunk
from megabert.data.order import ChunkId, Documents
from megabert.data.packing import choose_pieces
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.stream import MASKING, philox
from tests.helpers.runs import REPOSITORY

README = Path(REPOSITORY, "megabert/data/README.md")
TOKENIZER = TokenizerInfo("f" * 64, 50, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, (0, 1, 2, 3, 4))
DOCUMENTS = [[*range(10, 20)], [30, 31, 32], [40, 41, 42, 43]]


def line(name: str, *parts: list[int]) -> str:
    return f"{name:18}" + "    ".join(" ".join(map(str, part)) for part in parts)


def test_the_worked_example_is_what_the_code_computes():
    tokens = np.concatenate(DOCUMENTS).astype(np.uint16)
    size = np.array([len(document) for document in DOCUMENTS])
    chunk = Documents(tokens, size.cumsum() - size, size)
    cut = cut_chunk(ChunkId(0, 0), 0, chunk, PieceOptions(8, truncate=False), TOKENIZER, [])
    pieces = np.split(cut.ids, cut.begins[1:])
    chosen = choose_pieces(cut.lengths, capacity=20, max_pieces=6, max_seq_len=8)
    batch = lay_out(
        Bin([pieces[number] for number in chosen], cut.lengths[chosen]),
        Shapes(bin_tokens=20, max_documents=6, max_masked=6),
        index=0,
        max_seq_len=8,
        mlm_probability=0.3,
        tokenizer=TOKENIZER,
        rng=philox(17, MASKING, 0),
    )
    lines = [line("documents", *DOCUMENTS), line("pieces", *(piece.tolist() for piece in pieces))]
    lines += [line(name, getattr(batch, name).tolist()) for name in batch.shapes.parts()]
    written = [text.strip() for text in README.read_text().splitlines()]
    assert [text for text in written if text in lines] == lines
