"""Fine-tune an exported encoder on a labelled task, beside the same model from random weights and TF-IDF. On the CPU.

python launch/finetune_glue.py runs/quickstart/hf --out runs/quickstart/finetune
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megabert import flags


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """a folder written by launch/convert_to_hf.py"""
    out: str = "runs/finetune"
    """folder to write results.json and results.md to"""
    task: Literal["movie-sentiment"] = "movie-sentiment"
    """which labelled task; its data is fetched if it is missing"""
    data: str = "data/glue"
    """folder for the task's data"""
    epochs: int = 3
    """passes over the training examples"""
    batch_size: int = 32
    """examples per step"""
    lr: float = 5e-5
    """peak learning rate"""
    pooling: Literal["cls", "mean"] = "cls"
    """what the classifier sees: the first token, or the mean of all, which suits encoders trained only briefly"""
    rescale_embeddings: bool = False
    """bring pretrained embeddings back to their initial norm, which changes no output, so that they learn as fast"""
    seeds: list[int] = field(default_factory=lambda: [19])
    """one fine-tuning each; the table shows means"""

    def __post_init__(self):
        if not self.seeds or min(self.epochs, self.batch_size) < 1:
            raise ValueError("--seeds names at least one seed; --epochs and --batch-size are at least 1.")


def main() -> None:
    options = flags.read_flags(Options, "launch/finetune_glue.py", __doc__ or "")
    from megabert.data.manifest import write_atomically
    from megabert.glue import movie_sentiment  # after the flags: torch takes seconds to load
    from megabert.glue.finetune import model_fingerprint
    from megabert.glue.report import compare, markdown

    out = Path(options.out)
    request = {"options": asdict(options), "model": model_fingerprint(Path(options.checkpoint))}
    if (out / "results.json").is_file() and json.loads((out / "results.json").read_text())["request"] == request:
        print(f"{out}: already scored, reused\n\n{(out / 'results.md').read_text()}")
        return
    train, test = movie_sentiment.read(movie_sentiment.fetch(Path(options.data)))
    settings = {
        name: getattr(options, name) for name in ("epochs", "batch_size", "lr", "pooling", "rescale_embeddings")
    }
    results = compare(Path(options.checkpoint), movie_sentiment.TASK, train, test, settings, options.seeds)
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(movie_sentiment.TASK, results, len(train.texts), len(test.texts))
    write_atomically(out / "results.md", table.encode())
    write_atomically(out / "results.json", json.dumps({"request": request, "results": results}, indent=1).encode())
    print(table)


if __name__ == "__main__":
    flags.run(main, "launch/finetune_glue.py")
