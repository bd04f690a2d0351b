"""run.fp8: products of operands that are rounded to FP8, by torchao, emulated on the CPU. No GPU has run them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe_parser import RecipeParser, load_recipe
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.kernels.devices import has_fp8
from megabert.model.layers import Block
from megabert.training import unsupported
from megabert.training.unsupported import refusal_of_fp8, why_not_fp8
from tests.helpers.runs import TINY, Corpus, last_of_each, pretrain_command, run_command
from tests.model.helpers.small import small_model

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BF16 = {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to FP8 after scaling the largest value to the largest number of the format."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


@pytest.mark.fp8
@pytest.mark.parametrize("tokens", [64, 61, 1])
def test_a_layers_products_are_those_of_rounded_operands(tokens):
    from megabert.kernels.fp8 import use_fp8

    torch.manual_seed(0)
    model = small_model(**SIZES).float()
    names = list(model.state_dict())
    use_fp8(model, CPU)
    assert list(model.state_dict()) == names
    block = model.bert.encoder.layers[0]
    assert isinstance(block, Block)
    linear = block.attention.qkv
    x = torch.randn(tokens, SIZES["hidden_size"], requires_grad=True)
    upstream = torch.randn(tokens, 3 * SIZES["hidden_size"])
    (linear(x) * upstream).sum().backward()
    weight = linear.weight.detach()
    own, theirs = rounded(x.detach(), torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
    gradient = rounded(upstream, torch.float8_e5m2)
    torch.testing.assert_close(linear(x), own @ theirs.t() + linear.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, gradient @ theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.weight.grad, gradient.t() @ own, rtol=1e-5, atol=1e-5)
    # What is not rounded is exact, and the rounding is seen.
    torch.testing.assert_close(linear.bias.grad, upstream.sum(0))
    assert not torch.allclose(linear(x), x @ weight.t() + linear.bias, rtol=1e-3, atol=1e-3)


@pytest.mark.fp8
def test_the_linear_maps_of_layers_are_replaced_and_no_others():
    from megabert.kernels.fp8 import use_fp8

    model = small_model(**SIZES)
    use_fp8(model, CPU)
    fp8 = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    assert fp8 == {name for name in linear if name.startswith(tuple(f"{block}." for block in blocks))}
    assert len(fp8) == 4 * len(blocks)
    assert [name.split(".")[-2:] for name in linear - fp8] == [["transform", "dense"]]


@pytest.mark.fp8
def test_a_run_in_fp8_learns_as_in_bf16_resumes_and_keeps_its_weights(corpus: Corpus, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(BF16))

    def losses(out: str, *flags: str) -> list[float]:
        command = pretrain_command(
            corpus, tmp_path / out, "--run.max_steps=6", "--run.save_every_steps=3", *flags,
            ds_config=tmp_path / "ds.json",
        )  # fmt: skip
        done = run_command(command)
        assert done.code == 0, done.output
        records = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, records) if "loss" in record]

    expected = losses("bf16")
    got = losses("fp8", "--run.fp8=torchao")
    assert got != expected
    assert got == pytest.approx(expected, rel=0.01)
    whole = read_checkpoint(tmp_path / "fp8")[0]
    first = tmp_path / "fp8/checkpoints/step-00000003"
    assert losses("again", "--run.fp8=torchao", f"--run.resume={first}")[-3:] == got[-3:]
    resumed = read_checkpoint(tmp_path / "again")[0]
    assert whole.keys() == read_checkpoint(tmp_path / "bf16")[0].keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.fp8
@pytest.mark.nightly
def test_300_steps_of_the_quickstarts_model_end_within_a_hundredth_of_bf16(corpus: Corpus, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(BF16))
    found = []
    for fp8 in ("none", "torchao"):
        out = tmp_path / fp8
        flags = ["--recipe=quickstart", f"--data.train={corpus.tokens}", f"--run.output_dir={out}"]
        flags += ["--run.max_tokens=null", "--run.max_steps=300", "--run.eval_every_steps=300", f"--run.fp8={fp8}"]
        done = run_command([sys.executable, "launch/pretrain.py", f"--ds_config={tmp_path / 'ds.json'}", *flags])
        assert done.code == 0, done.output
        found.append(json.loads((out / "result.json").read_text())["heldout_loss"])
    assert found[1] == pytest.approx(found[0], rel=0.01)
    assert found[0] < 5.5, "it has learned"


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_nvidias_cards_have_fp8_from_ada_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fp8(torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("flags", "ds_config", "has_fp8", "reason"),
    [
        ([], BF16, True, None),
        ([], {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, True, None),
        ([], BF16, False, "this GPU has no FP8"),
        ([], {"zero_optimization": {"stage": 1}}, True, "in fp32, not in bf16"),
        ([], BF16 | {"zero_optimization": {"stage": 2}}, True, "ZeRO 2 has not been tried"),
        (["--model.intermediate_size=40"], BF16, True, "is no multiple of 16"),
    ],
)
def test_it_is_refused_where_it_cannot_be(monkeypatch, flags, ds_config, has_fp8, reason):
    monkeypatch.setattr(unsupported.importlib.util, "find_spec", lambda name: SimpleNamespace())
    recipe, _ = RecipeParser("pretrain", "").read(last_of_each([*TINY, "--run.max_steps=10", *flags]))
    found = why_not_fp8(recipe, ResolvedDsConfig(ds_config), has_fp8)
    assert found is None if reason is None else reason in str(found)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setattr(unsupported.importlib.util, "find_spec", lambda name: None)
    reason = why_not_fp8(load_recipe("quickstart"), ResolvedDsConfig(BF16), True)
    assert reason == "torchao is not installed (pip install 'megabert[fp8]')"
    assert refusal_of_fp8(reason).endswith("Change that, or set run.fp8 to none.")
