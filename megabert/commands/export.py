"""Export a training checkpoint to a Hugging Face folder, and check that it loads there with the same logits.

{command} runs/quickstart runs/quickstart/hf
{command} runs/quickstart runs/quickstart/hf --onnx --average 3
{command} --verify-only runs/quickstart/hf
{command} runs/mosaicbert-base mosaicbert-base-published --layout published
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from megabert.config import cli


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """folder of a run (its newest checkpoint), or one checkpoints/step-... folder"""
    out: str
    """folder to write"""
    average: int = 1
    """export the mean of the weights of this many checkpoints: this one and those before it"""
    onnx: bool = False
    """also write onnx/model.onnx and check it with onnxruntime; needs the extra [onnx]"""
    max_shard_size: str = "5GB"
    """larger weights are split into several files"""
    layout: Literal["hf", "published"] = "hf"
    """published: the layout of mosaicml/mosaic-bert-base, from a checkpoint of MosaicBERT or an exported folder"""

    def __post_init__(self):
        if self.layout == "published" and (self.onnx or self.max_shard_size != "5GB"):
            raise ValueError("--layout published writes one pickle; it takes no --onnx and no --max-shard-size.")


@dataclass(frozen=True)
class Verify:
    verify_only: str = ""
    """folder that this command wrote: check it again, write nothing. Runs the folder's own modelling code"""


def main(prog: str) -> None:
    if any(cli.split_flag(word)[0] == "--verify_only" for word in sys.argv[1:]):
        folder = cli.read_flags(Verify, prog, __doc__ or "").verify_only
        # Imported after the flags are read: torch takes seconds to load.
        from megabert.convert.check.export_check import verify

        report(folder, verify(Path(folder)))
        return
    options = cli.read_flags(Options, prog, __doc__ or "")
    if options.layout == "published":
        from megabert.convert.to_mosaicbert import publish

        written = publish(Path(options.checkpoint), Path(options.out), options.average)
        print(f"{options.out}: {written.num_tensors} tensors of the published MosaicBERT, read back bit for bit")
        print(f"initialized, for the source lacks them: {', '.join(written.initialized) or 'none'}")
        return
    from megabert.convert.to_hf import Wish, export

    wish = Wish(options.average, options.onnx, options.max_shard_size)
    report(options.out, export(Path(options.checkpoint), Path(options.out), wish))


def report(folder: str, measured: dict) -> None:
    if measured.get("reused"):
        print(f"{folder}: an export of this checkpoint is there, and its files are as they were checked then")
    print(
        f"{folder}: loads in transformers {measured['transformers']} without megabert, "
        f"logits differ by at most {measured['max_difference']:.1e}"
    )
    if "onnx_max_difference" in measured:
        print(f"{folder}/onnx/model.onnx: its logits differ by at most {measured['onnx_max_difference']:.1e}")


def command(prog: str = "megabert-export") -> NoReturn:
    cli.run(lambda: main(prog), prog)


if __name__ == "__main__":
    command()
