"""Export a checkpoint to a folder that transformers loads, and prove that it does.

The folder carries its own modelling code (a copy of megabert/model), so that it loads with trust_remote_code=True where
megabert is not installed. After writing, a fresh process that cannot import megabert loads it and must reproduce the
checkpoint's logits; otherwise the folder is removed.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from megabert.checkpoint_format import MANIFEST, State, find_checkpoint
from megabert.convert.checkpoint import read_checkpoint
from megabert.data.manifest import TOKENIZER
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

RECEIPT = "export.json"  # which checkpoint an exported folder is, and what the gate measured
MODEL_CODE = Path(__file__).parents[1] / "model"
AUTO_CLASSES = {
    "AutoConfig": "configuration_megabert.MegaBertConfig",
    "AutoModel": "modeling_megabert.MegaBertModel",
    "AutoModelForMaskedLM": "modeling_megabert.MegaBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_megabert.MegaBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_megabert.MegaBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_megabert.MegaBertForQuestionAnswering",
}
TOLERANCE = 1e-5  # fp32 logits, absolute: the same operations in another process

# Real sentences of three lengths; what they say does not matter, that they are text does.
GATE_TEXTS = (
    "Return a new array of given shape and type, filled with zeros.",
    "The optimizer's learning rate.",
    "If the file does not exist, an error is raised; otherwise its contents are read line by line, decoded as UTF-8, and "
    "passed to the function, which must not modify them. Lines that begin with a number sign are comments.",
)

# Runs in a process of its own: sys.modules["megabert"] = None makes every import of megabert fail.
GATE = """
import sys
sys.modules["megabert"] = None
import json, numpy as np, torch, transformers
transformers.logging.set_verbosity_error()
folder, expected, tolerance = sys.argv[1], np.load(sys.argv[2]), float(sys.argv[3])
model, info = transformers.AutoModelForMaskedLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32)
wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
if wrong:
    sys.exit(f"weights do not match the model: {wrong}")
with torch.no_grad():
    logits = model.eval()(torch.from_numpy(expected["input_ids"]), torch.from_numpy(expected["attention_mask"])).logits
real = expected["attention_mask"].astype(bool)
difference = float(np.abs(logits.numpy() - expected["logits"])[real].max())
if not difference <= tolerance:
    sys.exit(f"logits differ by {difference:.3g}, more than {tolerance:.0e}")
print(json.dumps({"max_difference": difference, "transformers": transformers.__version__}))
"""


def export(checkpoint: Path, out: Path) -> dict:
    """Export a checkpoint; returns what the gate measured. An export of this very checkpoint is reused.

    Raises ValueError if there is no whole checkpoint, if `out` holds something else, or if the gate fails, in which case
    nothing is left at `out`.
    """
    fingerprint = export_fingerprint(checkpoint)
    if (done := _read_receipt(out)) and done["checkpoint"] == fingerprint:
        return done["measured"]
    weights, config, state = read_checkpoint(checkpoint)
    if out.exists() and any(out.iterdir()) and not (out / RECEIPT).is_file():
        raise ValueError(f"{out}: is not empty and not an export of ours; choose another folder.")
    staged = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        write_folder(staged, weights, config, state, checkpoint)
        measured = gate(staged, weights, config)
        receipt = {"checkpoint": fingerprint, "measured": measured}
        (staged / RECEIPT).write_text(json.dumps(receipt, indent=1))
    except BaseException:
        shutil.rmtree(staged)
        raise
    if out.exists():
        before = out.with_name(f".tmp-old-{out.name}")
        shutil.rmtree(before, ignore_errors=True)
        out.rename(before)
        staged.rename(out)
        shutil.rmtree(before)
    else:
        staged.rename(out)
    return measured


def export_fingerprint(checkpoint: Path) -> str:
    """Name the checkpoint and the modelling code that an export is made of."""
    files = [find_checkpoint(checkpoint) / MANIFEST, *sorted(MODEL_CODE.glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read_receipt(out: Path) -> dict | None:
    path = out / RECEIPT
    return json.loads(path.read_text()) if path.is_file() else None


def write_folder(out: Path, weights: dict[str, Tensor], config: MegaBertConfig, state: State, checkpoint: Path) -> None:
    """Write weights, config, modelling code, tokenizer and model card."""
    config.architectures = ["MegaBertForMaskedLM"]
    config.auto_map = AUTO_CLASSES
    config.save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in sorted(MODEL_CODE.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, out / file.name)
    folder = find_checkpoint(checkpoint)
    shutil.copyfile(folder / TOKENIZER, out / TOKENIZER)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = state.max_seq_len
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (out / "README.md").write_text(model_card(config, state))


def gate(folder: Path, weights: dict[str, Tensor], config: MegaBertConfig) -> dict:
    """Compare the folder, loaded without megabert, with the checkpoint. Raises ValueError if they differ."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.enable_padding(pad_id=config.pad_token_id)
    tokenizer.enable_truncation(config.max_position_embeddings)
    encodings = tokenizer.encode_batch(list(GATE_TEXTS))
    input_ids = torch.tensor([encoding.ids for encoding in encodings])
    attention_mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    model = MegaBertForMaskedLM(config)
    names = {name for name, _ in model.named_parameters()}
    if names != weights.keys():
        raise ValueError(f"the checkpoint's parameters are not the model's: {sorted(names ^ weights.keys())}.")
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        logits = model.eval()(input_ids, attention_mask).logits
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch, "expected.npz")
        np.savez(expected, input_ids=input_ids, attention_mask=attention_mask, logits=logits)
        command = [sys.executable, "-c", GATE, str(folder.resolve()), str(expected), str(TOLERANCE)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ValueError(f"the exported folder failed its check and was removed: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def model_card(config: MegaBertConfig, state: State) -> str:
    """What the model is and how it was trained, from the run's own numbers."""
    size = f"{config.num_hidden_layers} layers x {config.hidden_size}, {config.num_attention_heads} heads"
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [megabert, {config.position}, {config.ffn}]
---
# A {"MosaicBERT" if config.position == "alibi" else "BERT"}-style encoder ({size})

Trained with MegaBERT for {state.step:,} steps on {state.tokens:,} tokens (seed {state.recipe["run"]["seed"]}), pieces of at
most {state.max_seq_len} tokens, {state.recipe["masking"]["mlm_probability"]:.0%} masking.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("this folder", trust_remote_code=True)
```
"""
