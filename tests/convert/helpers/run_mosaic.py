"""Run Mosaic's own BertForMaskedLM. A program for an environment with torch, einops and transformers 4.31:

python tests/convert/helpers/run_mosaic.py REFERENCE FOLDER [--write]

REFERENCE has Mosaic's bert_layers.py, bert_padding.py and configuration_bert.py. FOLDER has inputs.pt: input_ids,
attention_mask and labels. Without --write the model is FOLDER's config.json and pytorch_model.bin; with it, a model
with random weights is made for config.json and written as pytorch_model.bin. outputs.pt gets logits, loss, and the
gradient of every parameter, in fp64.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch


def import_reference(folder: Path) -> tuple:
    """Return the classes of the config and the model. Its files import each other as a package, or by sys.path."""
    package = types.ModuleType("mosaic")
    package.__path__ = [str(folder)]
    sys.modules["mosaic"] = package
    sys.path.insert(0, str(folder))
    for name in ("flash_attn_triton", "mosaic.flash_attn_triton"):
        sys.modules[name] = None  # type: ignore[assignment] # its plain attention runs on a CPU
    config = importlib.import_module("mosaic.configuration_bert").BertConfig
    return config, importlib.import_module("mosaic.bert_layers").BertForMaskedLM


def main(reference: Path, folder: Path, write: bool) -> None:
    config_class, model_class = import_reference(reference)
    settings = json.loads((folder / "config.json").read_text())
    model = model_class(config_class(**settings)).double()
    if write:
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        # fp32, as published
        torch.save({name: tensor.float() for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.load_state_dict(state, strict=True)
    model.eval()
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    with torch.no_grad():
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save({"logits": logits, "loss": loss.detach(), "gradients": gradients}, folder / "outputs.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--write" in sys.argv[3:])
