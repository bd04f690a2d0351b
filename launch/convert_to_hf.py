"""Export a training checkpoint to a Hugging Face folder, and check that it loads there and gives the same logits.

python launch/convert_to_hf.py runs/quickstart runs/quickstart/hf
"""

from dataclasses import dataclass
from pathlib import Path

from megabert import flags


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """a run's folder (its newest checkpoint), or one checkpoints/step-... folder"""
    out: str
    """folder to write"""


def main() -> None:
    options = flags.read_flags(Options, "launch/convert_to_hf.py", __doc__ or "")
    from megabert.convert.to_hf import export  # after the flags: torch and DeepSpeed take seconds to load

    measured = export(Path(options.checkpoint), Path(options.out))
    print(
        f"{options.out}: loads in transformers {measured['transformers']} without megabert, "
        f"logits differ by at most {measured['max_difference']:.1e}"
    )


if __name__ == "__main__":
    flags.run(main, "launch/convert_to_hf.py")
