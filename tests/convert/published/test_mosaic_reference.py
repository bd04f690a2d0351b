"""Mosaic's own code gives our logits, loss and gradients, both ways. It is not in this repository; get it first:

    git clone https://github.com/mosaicml/examples
    python3 -m venv mosaic && mosaic/bin/pip install torch transformers==4.31.0 einops 'numpy<2'
    MOSAIC_REFERENCE=examples/examples/benchmarks/bert/src MOSAIC_PYTHON=mosaic/bin/python \
        bash tests/run.sh tests/convert/published/test_mosaic_reference.py

MOSAIC_REFERENCE may also be a download of mosaicml/mosaic-bert-base. Without it the tests are skipped.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from megabert.convert.from_hf import import_model
from megabert.convert.to_mosaicbert import export_mosaicbert
from megabert.convert.weight_names import to_megabert
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from tests.convert.helpers.small_model import SHAPE, small_model
from tests.helpers.runs import run_command

pytestmark = pytest.mark.mosaic

# Both models compute in fp64, but Mosaic's ALiBi bias is made in fp32.
TOLERANCE = 1e-8
# Also such as are no power of two, for which ALiBi's slopes are made of two sequences.
HEADS = [3, 4, 8, 12]


def write_inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Rows padded on the right, and labels above 0 at a third of the tokens: Mosaic's loss ignores a label of 0."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 800, (4, 33), generator=generator)
    mask = (torch.arange(33) < torch.tensor([[33], [20], [9], [2]])).long()
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & mask.bool()
    chosen[:, 0] = True
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~chosen, -100)}
    torch.save(inputs, folder / "inputs.pt")
    return inputs


def run_reference(folder: Path, *flags: str) -> dict:
    """Run Mosaic's model on a folder and return what it computed."""
    python = os.environ.get("MOSAIC_PYTHON", "python")
    script = "tests/convert/helpers/run_mosaic.py"
    reference = str(Path(os.environ["MOSAIC_REFERENCE"]).resolve())
    done = run_command([python, script, reference, str(folder), *flags], PYTHONPATH="")
    assert done.code == 0, done.output
    return torch.load(folder / "outputs.pt", weights_only=True)


def assert_same(model: MegaBertForMaskedLM, inputs: dict[str, torch.Tensor], expected: dict) -> None:
    """Compare logits at real tokens, the loss and every gradient, in fp64."""
    model = model.double().eval()
    output = model(**inputs)
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected["logits"][real], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=0, atol=TOLERANCE)
    gradients = to_megabert(expected["gradients"], "mosaicbert").weights
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("num_heads", HEADS)
def test_their_model_is_ours_after_an_import(tmp_path, num_heads):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shape = SHAPE | {"hidden_size": 48, "num_attention_heads": num_heads}
    settings = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "alibi_starting_size": 16}
    (theirs / "config.json").write_text(json.dumps(shape | settings))
    inputs = write_inputs(theirs)
    expected = run_reference(theirs, "--write")
    imported = import_model(theirs, tmp_path / "ours")
    assert imported.initialized == imported.unused == []
    assert_same(MegaBertForMaskedLM.from_pretrained(tmp_path / "ours"), inputs, expected)


@pytest.mark.parametrize("num_heads", HEADS)
def test_our_model_is_theirs_after_an_export(tmp_path, num_heads):
    ours = small_model(hidden_size=48, num_attention_heads=num_heads)
    ours.save_pretrained(tmp_path / "ours")
    export_mosaicbert(tmp_path / "ours", tmp_path / "published")
    inputs = write_inputs(tmp_path / "published")
    assert_same(ours, inputs, run_reference(tmp_path / "published"))
