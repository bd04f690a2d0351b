"""Export a training checkpoint to a Hugging Face folder, and check that the folder loads and gives the same logits.

{command} runs/quickstart runs/quickstart/hf
{command} runs/quickstart runs/quickstart/hf --for onnx,sentence-transformers --average 3
{command} --verify-only runs/quickstart/hf
{command} runs/quickstart runs/quickstart/hf-2048 --max-length 2048
{command} runs/imported-classifier classifier-hf
{command} runs/mosaicbert-base mosaicbert-base-published --layout published
"""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from megabert.config import cli
from megabert.config.settings import required, setting


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """folder of a run, for its newest checkpoint, or of one checkpoint (checkpoints/step-...), or a folder that an
    export or an import wrote"""
    out: str = required(is_output=True)
    """folder to write"""
    average: int = setting(1, "[1, 100000]")
    """export the mean of the weights of this many checkpoints: that one and those before it"""
    for_: str = ""
    """other programs to write files for, a list with commas: sentence-transformers, onnx, onnx-int8, encoder, jina,
    gguf, transformers.js. Each is opened and compared with the checkpoint, and removed if it differs"""
    max_shard_size: str = "5GB"
    """maximum size of a weights file; larger weights are written as several files"""
    max_length: int | None = setting(None, "[3, 10000000]")
    """maximum length of a text, tokens; by default the training length, with ALiBi at least 512"""
    layout: Literal["hf", "published"] = "hf"
    """published: the layout of mosaicml/mosaic-bert-base, for a MosaicBERT (a checkpoint, or a MegaBERT folder)"""

    def __post_init__(self):
        if self.layout == "published" and (self.for_ or self.max_shard_size != "5GB"):
            raise ValueError("--layout published writes one pickle: --for and --max-shard-size do not apply to it.")


@dataclass(frozen=True)
class VerifyOptions:
    verify_only: str = ""
    """folder that this command wrote: check it again, write nothing. Runs the folder's own modelling code"""


def main(prog: str) -> int:
    if any(cli.split_flag(word)[0] == "--verify_only" for word in sys.argv[1:]):
        return verify(cli.read_flags(VerifyOptions, prog, __doc__ or "").verify_only)
    options = cli.read_flags(Options, prog, __doc__ or "")
    return export_published(options) if options.layout == "published" else export(options)


def verify(folder: str) -> int:
    # Imported after the flags are read: torch takes seconds to load.
    from megabert.convert.check import export_check
    from megabert.convert.targets.registry import verify_targets

    return report(folder, export_check.verify(Path(folder)), verify_targets(Path(folder)))


def export_published(options: Options) -> int:
    from megabert.convert.to_mosaicbert import export_mosaicbert

    written = export_mosaicbert(Path(options.checkpoint), Path(options.out), options.average, options.max_length)
    if written.reused:
        print(f"{options.out}: is already this export, and its files are unchanged")
    print(f"{options.out}: {written.num_tensors} tensors in the published MosaicBERT layout, read back bit for bit")
    print(f"not in the original source, and not there: {', '.join(written.missing) or 'none'}")
    return 0


def export(options: Options) -> int:
    from megabert.convert.folder_to_hf import export_folder, is_model_folder
    from megabert.convert.targets.registry import parse_names, read_outcomes
    from megabert.convert.to_hf import ExportOptions, explain_targets, export_checkpoint
    from megabert.files.atomic import restore_folder

    targets = parse_names(options.for_)
    export_options = ExportOptions(options.average, targets, options.max_shard_size, options.max_length)
    checkpoint, out = Path(options.checkpoint), Path(options.out)
    # OUT may be the source, too.
    restore_folder(out.resolve())
    if is_model_folder(checkpoint):
        done = export_folder(checkpoint, out, export_options, lambda note: print(note, flush=True))
        print(f"{options.out}: {done.name}; never trained: {', '.join(done.initialized) or 'none'}")
        print(f"in {checkpoint} but not in this class: {', '.join(done.left_out) or 'none'}")
        return report(options.out, done.measured, read_outcomes(out))
    for note in explain_targets(checkpoint, export_options):
        print(note, flush=True)
    measured = export_checkpoint(checkpoint, out, export_options)
    return report(options.out, measured, read_outcomes(out))


def report(folder: str, measured: Mapping[str, Any], outcomes: Mapping[str, Any]) -> int:
    """Print what was measured. Returns the exit code: 1 if a target failed."""
    from megabert.convert.targets.registry import describe

    if measured.get("reused"):
        print(f"{folder}: is already an export of this checkpoint, and its files are unchanged since it was checked")
    print(
        f"{folder}: loads in transformers {measured['transformers']} without megabert, "
        f"logits differ by at most {measured['max_difference']:.1e}"
    )
    for name, outcome in outcomes.items():
        print(f"{folder}: {describe(name, outcome)}", file=sys.stderr if "failed" in outcome else sys.stdout)
    return int(any("failed" in outcome for outcome in outcomes.values()))


def command(prog: str = "megabert-export") -> NoReturn:
    cli.run(lambda: main(prog), prog)


if __name__ == "__main__":
    command()
