"""Export a training checkpoint to a Hugging Face folder, and check that it loads there and gives the same logits.

python launch/convert_to_hf.py runs/quickstart runs/quickstart/hf
python launch/convert_to_hf.py runs/quickstart runs/quickstart/hf --onnx --average 3
python launch/convert_to_hf.py --verify-only runs/quickstart/hf
python launch/convert_to_hf.py runs/mosaicbert-base mosaicbert-base-published --layout published
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megabert.config import cli


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """a run's folder (its newest checkpoint), or one checkpoints/step-... folder"""
    out: str
    """folder to write"""
    average: int = 1
    """export the mean of the weights of this many checkpoints, that one and those before it"""
    onnx: bool = False
    """write onnx/model.onnx too, and check it with onnxruntime; needs the extra [onnx]"""
    max_shard_size: str = "5GB"
    """weights larger than this become several files"""
    layout: Literal["hf", "published"] = "hf"
    """published: that of mosaicml/mosaic-bert-base, for its own code; of a MosaicBERT's checkpoint, or a folder of ours"""

    def __post_init__(self):
        if self.layout == "published" and (self.onnx or self.max_shard_size != "5GB"):
            raise ValueError("--layout published is one pickle: --onnx and --max-shard-size are not for it.")


@dataclass(frozen=True)
class Verify:
    verify_only: str = ""
    """a folder that this command wrote: check it again, write nothing. Runs the folder's own modelling code"""


def main() -> None:
    prog, doc = "launch/convert_to_hf.py", __doc__ or ""
    if any(cli.split_flag(word)[0] == "--verify_only" for word in sys.argv[1:]):
        folder = cli.read_flags(Verify, prog, doc).verify_only
        from megabert.convert.check.export_check import verify  # after the flags: torch takes seconds to load

        report(folder, verify(Path(folder)))
        return
    options = cli.read_flags(Options, prog, doc)
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


if __name__ == "__main__":
    cli.run(main, "launch/convert_to_hf.py")
