# ruff: noqa: E402 (what forbids megabert comes before what might import it)
"""The gate's other side: load an exported folder where megabert cannot be imported, and compare it with what was recorded.

python gate_process.py FOLDER prints what it measured as JSON, or ends with one line saying what is wrong. It is run as a file, in
a process of its own, and imports nothing of this project.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.modules["megabert"] = None  # type: ignore[assignment] # makes every import of it fail

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

ONNX = "onnx/model.onnx"


def main(folder: Path) -> dict:
    transformers.logging.set_verbosity_error()
    receipt = json.loads((folder / "export.json").read_text())
    recorded = load_file(folder / "gate.safetensors")
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    if wrong := {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}:
        sys.exit(f"weights do not match the model: {wrong}")
    check_parameters(model, receipt["parameters"])
    check_tokenizer(folder, receipt, recorded)
    inputs = recorded["input_ids"], recorded["attention_mask"]
    with torch.no_grad():
        logits = model.eval()(*inputs).logits
    measured = {
        "max_difference": compare(logits, recorded, receipt["tolerance"], "logits"),
        "largest_logit": float(recorded["logits"].abs().max()),
        "transformers": transformers.__version__,
    }
    if (folder / ONNX).is_file():
        tolerance = receipt["onnx_tolerance"]
        measured["onnx_max_difference"] = compare(run_onnx(folder / ONNX, *inputs), recorded, tolerance, "ONNX logits")
    return measured


def check_parameters(model: torch.nn.Module, expected: dict[str, str]) -> None:
    """Every parameter has the recorded bits, and any other name is one of them again."""
    state = model.state_dict()
    if absent := sorted(expected.keys() - state.keys()):
        sys.exit(f"the model lacks {len(absent)} parameters of the checkpoint: {absent[0]}")
    for name, digest in expected.items():
        if hashlib.sha256(state[name].contiguous().numpy()).hexdigest() != digest:
            sys.exit(f"parameter {name} is not the checkpoint's")
    places = {state[name].data_ptr() for name in expected}
    if extra := sorted(name for name, tensor in state.items() if tensor.data_ptr() not in places):
        sys.exit(f"the model has {len(extra)} parameters that the checkpoint has not: {extra[0]}")


def check_tokenizer(folder: Path, receipt: dict, recorded: dict[str, Tensor]) -> None:
    """As a user loads it, it makes the recorded ids of the recorded texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert tokenizer is not None, "the folder has a tokenizer.json"
    length = receipt["max_length"]
    made = tokenizer(receipt["texts"], padding=True, truncation=True, max_length=length, return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        if made[name].shape != recorded[name].shape:
            got, expected = tuple(made[name].shape), tuple(recorded[name].shape)
            sys.exit(f"the tokenizer makes {name} of shape {got} of the texts, the checkpoint's {expected}")
        if len(wrong := (made[name] != recorded[name]).any(dim=1).nonzero()):
            sys.exit(f"the tokenizer makes other {name} than the checkpoint's of {receipt['texts'][wrong[0]]!r}")


def compare(logits: Tensor, recorded: dict[str, Tensor], tolerance: float, what: str) -> float:
    """The largest difference at real tokens; beyond the tolerance it ends the process."""
    expected = recorded["logits"]
    got = logits[recorded["attention_mask"].bool()]
    if got.shape != expected.shape:
        sys.exit(f"{what} have shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    difference = float((got - expected).abs().max())
    allowed = tolerance * max(1.0, float(expected.abs().max()))  # fp32 rounds relative to what it rounds
    if not difference <= allowed:  # a NaN is not
        sys.exit(f"{what} differ by {difference:.3g}, more than {allowed:.1e}")
    return difference


def run_onnx(path: Path, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
    return torch.from_numpy(session.run(["logits"], feed)[0])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
