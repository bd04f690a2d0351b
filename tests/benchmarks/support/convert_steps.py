"""The steps that bench_convert.py measures, each in its own process.

    python -m tests.benchmarks.support.convert_steps STEP ARGUMENTS

checkpoints OUT TOKENIZER       write a checkpoint of each size to OUT/SIZE-run, as two ranks at ZeRO 3 write it
export RUN OUT                  as launch/convert_to_hf.py
import FOLDER OUT               as launch/convert_from_hf.py
export-mosaicbert FOLDER OUT    as launch/convert_to_hf.py --layout published

Prints one line of JSON: the step's seconds, without those in which Python and torch start, and the peak memory of the
process and of its largest child by getrusage.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch

from megabert.convert.from_hf import import_model
from megabert.convert.to_hf import export_checkpoint
from megabert.convert.to_mosaicbert import export_mosaicbert
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from tests.convert.helpers.checkpoints import write_checkpoint

SIZES = {
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
}


def write_large_checkpoint(size: str, run: Path, tokenizer: Path) -> None:
    with torch.device("meta"):
        model = MegaBertForMaskedLM(MegaBertConfig(**SIZES[size]))
    model.to_empty(device="cpu").tie_weights()
    # Repeated, because drawing 435 million numbers takes longer than writing them.
    some = torch.randn(1 << 20) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            repeats = -(-parameter.numel() // len(some))
            parameter.copy_(some.repeat(repeats)[: parameter.numel()].view_as(parameter))
            if name.endswith("norm.weight"):
                parameter.add_(1)
    write_checkpoint(run, model, tokenizer, stage=3, world_size=2)


def main() -> None:
    step, *arguments = sys.argv[1:]
    first, second = map(Path, arguments)
    began = time.perf_counter()
    if step == "checkpoints":
        for size in SIZES:
            write_large_checkpoint(size, first / f"{size}-run", second)
    elif step == "export-mosaicbert":
        export_mosaicbert(first, second)
    elif step == "export":
        export_checkpoint(first, second)
    else:
        import_model(first, second)
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sys.stdout.write(json.dumps({"seconds": seconds, "own_gb": peaks[0], "child_gb": peaks[1]}) + "\n")


if __name__ == "__main__":
    main()
