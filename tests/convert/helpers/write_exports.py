"""Export a small model of each architecture, for check_transformers_versions.sh.

python -m tests.convert.helpers.write_exports OUT
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from data_prep import train_tokenizer
from data_prep.sources.docstrings import docstrings
from megabert.convert.to_hf import ExportOptions, export_checkpoint
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.model.helpers.architectures import ARCHITECTURES

WITH_GRAPHS = ("mosaicbert", "bert", "modernbert")


def main(out: Path) -> None:
    spec = find_spec("torch.optim")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.py"))
    texts = out / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for file in files for text in docstrings(file)))
    train_tokenizer.main([f"--source={texts}", f"--out={out / 'tokenizer'}", "--vocab_size=800"])
    for name, changes in ARCHITECTURES.items():
        write_checkpoint(out / "runs" / name, small_model(**changes), out / "tokenizer")
        options = ExportOptions(targets=("onnx",) if name in WITH_GRAPHS else ())
        export_checkpoint(out / "runs" / name, out / "exports" / name, options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
