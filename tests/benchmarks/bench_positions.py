"""Train small models on pieces of 128 tokens, and measure their loss at every position of texts of 1,024 tokens.

    python tests/benchmarks/bench_positions.py [--quick] [--json FILE] [--picture FILE.png] [--out FOLDER]

Three models differ in `model.position` alone: alibi, rope and learned, whose position table has 1,024 rows. They are
the quickstart's recipe and train on the same bins, each at the learning rate of three with which it learns most. The
corpus is the docstrings of installed packages, where the docstrings of one Python file are one document. Every 12th
file is held out; of those, texts of 1,022 tokens are read at once, with [CLS] and [SEP], and the loss of the same 15 %
of masked tokens is averaged over positions. A rate at which a model diverges is left out.
cut_loss: the same tokens, where the text is read in pieces of 128.
POSITION_loss_LAST: over the positions from the previous limit to LAST. POSITION_beyond: loss beyond 128 less the loss
of the same tokens in pieces of 128, in nats; below 0, the longer text helps.
The full run takes about 25 minutes on two cores. With --out, corpus and runs stay in that folder, and the same command
continues after an interruption.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# For the reason given in bench_train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from matplotlib.figure import Figure
from support.report import make_parser, new_file, write
from tokenizers import Tokenizer

import megabert
from data_prep import train_tokenizer, write_shards
from data_prep.sources.docstrings import docstrings, list_input_splits
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.files.json_file import read_json
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.updates.guard import DivergedError

MODELS: dict[str, dict[str, object]] = {
    "alibi": {"position": "alibi"},
    "rope": {"position": "rope"},
    "learned": {"position": "learned", "max_position_embeddings": 1024},
}
# One rate would not be fair: at 2e-3 the learned positions hardly train.
RATES, QUICK_RATES = (5e-4, 1e-3, 2e-3), (1e-3,)
TRAINED_LENGTH = 128
READ_LENGTH = 1024
LIMITS = (128, 256, 512, 1024)
MASKED_SHARE = 0.15
TOKENS, QUICK_TOKENS = 1_700_000, 40_960
TEXTS, QUICK_TEXTS = 200, 8
# Every 8th file of the corpus.
QUICK_FILES = 8
HOLD_OUT_EVERY = 12
# Positions that one point of a curve averages.
CURVE_STEP = 32


class Reading(NamedTuple):
    """ids, labels: (texts, 1024) int64; labels are -100 where no token is masked."""

    ids: torch.Tensor
    labels: torch.Tensor


def main() -> None:
    parser = make_parser(__doc__ or "", quick="40 steps of each model: shows that the command works")
    parser.add_argument("--picture", type=new_file, help="file to draw the loss against the position to")
    parser.add_argument("--out", type=Path, help="folder for corpus and runs; default: a temporary one")
    arguments = parser.parse_args()
    with nullcontext(arguments.out) if arguments.out else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tokens/manifest.json").is_file():
            # A process of its own, because data_prep's workers import everything that the main program imports.
            every = QUICK_FILES if arguments.quick else 1
            command = [sys.executable, __file__, "--prepare", str(folder), str(every)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        reading = read_held_out(folder, QUICK_TEXTS if arguments.quick else TEXTS)
        tokens, rates = (QUICK_TOKENS, QUICK_RATES) if arguments.quick else (TOKENS, RATES)
        losses = {position: curves_of(best_run(folder, position, rates, tokens), reading) for position in MODELS}
    figures = figures_of(losses)
    print(table(losses))
    for name, value in figures.items():
        print(f"{name:22} {value:+.3f}" if name.endswith("beyond") else f"{name:22} {value:.3f}")
    if arguments.picture:
        draw(losses, arguments.picture)
    write(figures, arguments.json)


def prepare(folder: Path, every: int) -> None:
    """Write corpus, tokenizer, shards and held-out.jsonl: one document is the docstrings of one Python file.

    every: take every n-th file.
    """
    paths = [path for split in list_input_splits() for path in split.paths][::every]
    texts = ["\n\n".join(docstrings(Path(path))) for path in paths]
    for name, chosen in (
        ("train", [text for i, text in enumerate(texts) if i % HOLD_OUT_EVERY]),
        ("held-out", texts[::HOLD_OUT_EVERY]),
    ):
        lines = [json.dumps({"text": text}) + "\n" for text in chosen if len(text) >= 200]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    source, tokenizer = f"--source={folder / 'train.jsonl'}", f"{folder / 'tokenizer'}"
    train_tokenizer.main([source, f"--out={tokenizer}", "--vocab_size=8192"])
    write_shards.main(
        [source, f"--tokenizer={tokenizer}", f"--out={folder / 'tokens'}", "--heldout=0.02", "--on-bad-document=skip"]
    )


def read_held_out(folder: Path, count: int) -> Reading:
    """Mask the first 1,022 tokens of held-out texts that are long enough. Raises ValueError if there are too few."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    cls, sep, mask = (vocabulary[name] for name in ("[CLS]", "[SEP]", "[MASK]"))
    texts = [json.loads(line)["text"] for line in (folder / "held-out.jsonl").read_text().splitlines()]
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    rows = [row[: READ_LENGTH - 2] for row in rows if len(row) >= READ_LENGTH - 2][:count]
    if len(rows) < count:
        raise ValueError(f"{len(rows)} held-out texts have {READ_LENGTH - 2} tokens, expected {count}.")
    ids = torch.tensor([[cls, *row, sep] for row in rows])
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < MASKED_SHARE
    masked[:, 0] = masked[:, -1] = False
    return Reading(ids.masked_fill(masked, mask), ids.masked_fill(~masked, -100))


def best_run(folder: Path, position: str, rates: tuple[float, ...], tokens: int) -> Path:
    """Train a model at every learning rate. Returns the run with the lowest held-out loss on pieces of 128.

    A run that has finished is not repeated.
    """
    runs: dict[Path, float] = {}
    for rate in rates:
        recipe = megabert.load_recipe(
            "quickstart",
            model=MODELS[position],
            data={"train": str(folder / "tokens"), "max_seq_len": TRAINED_LENGTH},
            optimizer={"lr": rate},
            run={
                "output_dir": str(folder / f"{position}-{rate:g}"),
                "max_tokens": tokens,
                "save_every_steps": 100_000,
                "eval_every_steps": 100_000,
            },
        )
        out = Path(recipe.run.output_dir)
        if not (out / "result.json").is_file():
            try:
                megabert.pretrain(recipe, ds_config="zero0")
            except DivergedError as error:
                print(f"{out.name}: left out: {error}", flush=True)
                continue
        loss = read_json(out / "result.json")["heldout_loss"]
        assert loss is not None, f"{out}: the run stopped early. Remove it."
        runs[out] = loss
    return min(runs, key=lambda run: runs[run])


def curves_of(run: Path, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of every CURVE_STEP positions: of whole texts, and of pieces of 128."""
    trained = read_checkpoint(run)
    model = MegaBertForMaskedLM(trained.config).eval()
    # The decoder shares its weight with the embeddings.
    model.load_state_dict(trained.weights, strict=False)
    at_once, pieces = token_losses(model, reading), token_losses(model, cut(reading))
    # The pieces start with [CLS] of their own, so only the texts' 1,022 tokens are compared.
    return mean_by_position(at_once[:, 1:-1], reading), mean_by_position(join(pieces, len(reading.ids)), reading)


def cut(reading: Reading) -> Reading:
    """Cut texts into pieces of 128 with [CLS] and [SEP] of their own; the last piece takes what is left of 1,022."""
    room = TRAINED_LENGTH - 2
    cls, sep = reading.ids[:, :1], reading.ids[:, -1:]
    ids, labels = [], []
    for begin in range(1, READ_LENGTH - 1, room):
        end = min(begin + room, READ_LENGTH - 1)
        ids.append(torch.cat([cls, reading.ids[:, end - room : end], sep], 1))
        labels.append(torch.nn.functional.pad(reading.labels[:, end - room : end], (1, 1), value=-100))
    return Reading(torch.cat(ids), torch.cat(labels))


def join(losses: torch.Tensor, texts: int) -> torch.Tensor:
    """Put the pieces' losses (pieces x texts, 128) together: (texts, 1022). Inverse of `cut`."""
    parts = losses[:, 1:-1].view(-1, texts, TRAINED_LENGTH - 2)
    joined = torch.empty(texts, READ_LENGTH - 2)
    for number, part in enumerate(parts):
        end = min((number + 1) * (TRAINED_LENGTH - 2), READ_LENGTH - 2)
        joined[:, end - part.shape[1] : end] = part
    return joined


@torch.no_grad()
def token_losses(model: MegaBertForMaskedLM, reading: Reading, batch: int = 8) -> torch.Tensor:
    """Return the loss of every masked token, nats, in the shape of the labels; 0 elsewhere."""
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits.transpose(1, 2), labels, reduction="none")
        for ids, labels in zip(reading.ids.split(batch), reading.labels.split(batch), strict=True)
    ]
    return torch.cat(losses)


def mean_by_position(losses: torch.Tensor, reading: Reading) -> torch.Tensor:
    """losses: (texts, 1022). Returns the mean of the masked tokens in every CURVE_STEP positions."""
    sums = losses.sum(0)
    counts = (reading.labels[:, 1:-1] != -100).sum(0)
    return torch.stack(
        [part.sum() / count.sum() for part, count in zip(sums.split(CURVE_STEP), counts.split(CURVE_STEP), strict=True)]
    )


def figures_of(losses: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    figures = {}
    first = TRAINED_LENGTH // CURVE_STEP
    for name, (at_once, pieces) in losses.items():
        for begin, end in ranges():
            figures[f"{name}_loss_{end}"] = at_once[begin // CURVE_STEP : end // CURVE_STEP].mean().item()
        figures[f"{name}_beyond"] = (at_once[first:].mean() - pieces[first:].mean()).item()
    return figures


def ranges() -> list[tuple[int, int]]:
    return list(zip((0, *LIMITS[:-1]), LIMITS, strict=True))


def table(losses: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """A Markdown table: a row per model and way of reading, a column per range of positions."""
    lines = ["| held-out loss at positions | " + " | ".join(f"{begin} to {end}" for begin, end in ranges()) + " |"]
    lines.append("|---" * (len(LIMITS) + 1) + "|")
    for name, ways in losses.items():
        for way, curve in zip(("1,024 tokens at once", "pieces of 128"), ways, strict=True):
            cells = [f"{curve[begin // CURVE_STEP : end // CURVE_STEP].mean():.2f}" for begin, end in ranges()]
            lines.append(f"| {name}, {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(losses: dict[str, tuple[torch.Tensor, torch.Tensor]], out: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, (at_once, pieces)) in enumerate(losses.items()):
        centers = [CURVE_STEP * (i + 0.5) for i in range(len(at_once))]
        axes.plot(centers, at_once.tolist(), color=f"C{number}", label=f"{name}, 1,024 tokens at once")
        axes.plot(centers, pieces.tolist(), color=f"C{number}", ls=":", label=f"{name}, pieces of 128")
    axes.axvline(TRAINED_LENGTH, color="gray", lw=0.8)
    axes.annotate("trained on 128", (TRAINED_LENGTH, 0.02), xycoords=("data", "axes fraction"), color="gray")
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("held-out loss, nats per masked token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
