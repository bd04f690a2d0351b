# ruff: noqa: E402 (megabert must be made unimportable before anything else is imported)
"""Load an exported folder where megabert cannot be imported, and compare it with what the export recorded.

    python subprocess_check.py FOLDER

It prints its measurements as JSON, or exits with one line that says what is wrong. It must run as a file in a process
of its own, and imports nothing of this project.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.modules["megabert"] = None  # type: ignore[assignment] # makes every import of it fail

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor


def main(folder: Path) -> dict[str, float | str]:
    transformers.logging.set_verbosity_error()
    record = json.loads((folder / "export.json").read_text())
    expected = load_file(folder / "export_check.safetensors")
    # A fine-tuned classifier's record has no head but "classifies".
    head = record.get("head", "SequenceClassification" if "classifies" in record else "MaskedLM")
    model, info = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    if wrong := {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}:
        sys.exit(f"weights do not match the model: {wrong}")
    check_parameters(model, record["parameters"])
    check_tokenizer(folder, record, expected)
    inputs = {name: tensor for name, tensor in expected.items() if name != "logits"}
    if head == "MultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        output = model.eval()(**inputs)
    answers = head == "QuestionAnswering"
    logits = torch.stack([output.start_logits, output.end_logits], dim=-1) if answers else output.logits
    return {
        "max_difference": check_logits(logits, expected, record["tolerance"]),
        "largest_logit": float(expected["logits"].abs().max()),
        "transformers": transformers.__version__,
    }


def check_parameters(model: torch.nn.Module, hashes: dict[str, str]) -> None:
    """Check that every parameter has the recorded bits, and that every other name is tied to one of them."""
    state = model.state_dict()
    if missing := sorted(hashes.keys() - state.keys()):
        sys.exit(f"the model lacks {len(missing)} parameters of the checkpoint: {missing[0]}")
    for name, digest in hashes.items():
        if hashlib.sha256(state[name].contiguous().numpy()).hexdigest() != digest:
            sys.exit(f"parameter {name} differs from the checkpoint's")
    recorded = {state[name].data_ptr() for name in hashes}
    if extra := sorted(name for name, tensor in state.items() if tensor.data_ptr() not in recorded):
        sys.exit(f"the model has {len(extra)} parameters that the checkpoint lacks: {extra[0]}")


def check_tokenizer(folder: Path, record: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Check that AutoTokenizer gives the recorded ids for the recorded texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert tokenizer is not None, f"{folder}: AutoTokenizer found no tokenizer"
    # A user of the folder may pad on the left and ask for no mask. The expected logits are of texts that begin in the
    # first slot, and need one.
    tokenizer.padding_side = "right"
    encoded = tokenizer(
        record["texts"],
        record.get("text_pairs"),
        padding=True,
        truncation=True,
        max_length=record["max_length"],
        return_tensors="pt",
        return_attention_mask=True,
        return_token_type_ids="token_type_ids" in expected,
    )
    for name in sorted(expected.keys() - {"logits"}):
        if name not in encoded:
            sys.exit(f"the tokenizer gives no {name}")
        if encoded[name].shape != expected[name].shape:
            got, wanted = tuple(encoded[name].shape), tuple(expected[name].shape)
            sys.exit(f"the tokenizer gives {name} of shape {got}, the checkpoint's gives {wanted}")
        if len(wrong := (encoded[name] != expected[name]).any(dim=1).nonzero()):
            sys.exit(f"the tokenizer gives other {name} than the checkpoint's for {record['texts'][wrong[0]]!r}")


def check_logits(logits: Tensor, expected: dict[str, Tensor], tolerance: float) -> float:
    """Return the largest difference at real tokens, or of texts; exit if it exceeds the tolerance."""
    wanted = expected["logits"]
    got = logits[expected["attention_mask"].bool()] if logits.dim() == 3 else logits
    if got.shape != wanted.shape:
        sys.exit(f"logits have shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    difference = float((got - wanted).abs().max())
    # Rounding errors of fp32 are relative.
    allowed = tolerance * max(1.0, float(wanted.abs().max()))
    # This form of the comparison also refuses NaN.
    if not difference <= allowed:
        sys.exit(f"logits differ by {difference:.3g}, more than {allowed:.1e}")
    return difference


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
