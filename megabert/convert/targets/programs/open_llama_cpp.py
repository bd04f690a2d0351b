"""Embed and tokenize texts with llama.cpp, where a crash of it ends only this process: FILE SCRATCH. See run.py."""

import json
import os
import sys
from pathlib import Path

import numpy as np


def main(file: str, scratch: Path) -> None:
    # A failed assertion is then the last line, and not a stack of calls.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    import llama_cpp

    question = json.loads((scratch / "question.json").read_text(encoding="utf-8"))
    model = llama_cpp.Llama(
        file,
        embedding=True,
        n_ctx=question["context"],
        n_batch=question["context"],
        n_ubatch=question["context"],
        n_gpu_layers=0,
        verbose=False,
    )
    rows = [model.embed(text, normalize=False) for text in question["texts"]]
    np.save(scratch / "answer.npy", np.array(rows, dtype=np.float32))
    ids = [model.tokenize(line.encode(), add_bos=True, special=False) for line in question["lines"]]
    (scratch / "answer.json").write_text(json.dumps({"version": llama_cpp.__version__, "ids": ids}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
