"""Open an export's ONNX graphs with optimum's ORTModel classes. Runs as a program, where megabert is not installed:

python tests/convert/helpers/use_ort_model.py FOLDER

Prints the largest difference of logits from those that the export recorded; an assertion that fails is the error.
"""

import json
import sys
from pathlib import Path

import optimum.version
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForMaskedLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

if __name__ == "__main__":
    sys.modules["megabert"] = None  # type: ignore[assignment]
    folder = Path(sys.argv[1])
    expected = load_file(folder / "export_check.safetensors")
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    load = {"subfolder": "onnx", "trust_remote_code": True, "local_files_only": True}
    masked_lm = ORTModelForMaskedLM.from_pretrained(folder, file_name="model_mlm.onnx", **load)
    real = inputs["attention_mask"].bool()
    difference = float((masked_lm(**inputs).logits[real] - expected["logits"]).abs().max())
    assert difference < 1e-4, difference
    encoder = ORTModelForFeatureExtraction.from_pretrained(folder, file_name="model.onnx", **load)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert tokenizer is not None
    text = tokenizer(["a tensor of zeros", "a tensor"], padding=True, return_tensors="pt", return_token_type_ids=False)
    states = encoder(**text).last_hidden_state
    alone = encoder(**tokenizer("a tensor", return_tensors="pt", return_token_type_ids=False)).last_hidden_state
    torch.testing.assert_close(states[1, : alone.shape[1]], alone[0], rtol=0, atol=1e-5)
    sys.stdout.write(json.dumps({"max_difference": difference, "optimum": optimum.version.__version__}) + "\n")
