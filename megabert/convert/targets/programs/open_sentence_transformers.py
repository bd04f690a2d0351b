"""Embed texts with sentence-transformers, where megabert cannot be imported: FOLDER SCRATCH. See run.py."""

import json
import sys
from pathlib import Path

import numpy as np


def main(folder: str, scratch: Path) -> None:
    sys.modules["megabert"] = None  # type: ignore[assignment] # makes every import of it fail
    import sentence_transformers

    texts = json.loads((scratch / "question.json").read_text(encoding="utf-8"))["texts"]
    model = sentence_transformers.SentenceTransformer(
        folder, trust_remote_code=True, local_files_only=True, device="cpu"
    )
    backwards = model.encode(texts[::-1], batch_size=16, show_progress_bar=False, convert_to_numpy=True)
    np.save(scratch / "answer.npy", backwards[::-1])
    answer = {"version": sentence_transformers.__version__, "ids": []}
    (scratch / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
