"""The masks of the CPU's fused dropouts are as random as PyTorch's, and make a step's gradient as noisy."""

import pytest
import torch

from megabert.kernels import cpu
from megabert.kernels.resolve import RECOMPILE_LIMIT
from megabert.model import ops
from megabert.model.layers import set_ops
from tests.kernels.helpers.masks import MASKS, assert_independent, assert_same_noise, gradient_noise, noise_of_rows
from tests.model.helpers.small import documents, padded, small_model

STEPS = 300


@pytest.fixture(autouse=True, params=["force_eager", pytest.param("default", marks=pytest.mark.nightly)])
def stance(request):
    """Whether the operations run eagerly, or as inductor compiles them."""
    limit = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)
    with torch.compiler.set_stance(request.param), limit:
        yield request.param


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("use", [cpu, ops], ids=["fused", "plain"])
def test_masks_of_layers_and_steps_are_independent(use, name, p):
    torch.manual_seed(7)
    assert_independent(torch.stack([MASKS[name](use, 96, 128, p) for _ in range(24)]), p)


def test_masks_that_repeat_or_drop_too_much_are_noticed():
    torch.manual_seed(7)
    masks = torch.stack([MASKS["geglu"](ops, 96, 128, 0.1) for _ in range(24)])
    repeated, shifted, streaked = masks.clone(), masks.clone(), masks.clone()
    repeated[1::2] = masks[::2]
    shifted[:, 1::2] = masks[:, ::2]
    streaked[:, :, 8::16] = masks[:, :, ::16]
    for wrong, reason in ((repeated, "layers or steps"), (shifted, "tokens"), (streaked, "eighth features")):
        with pytest.raises(AssertionError, match=reason):
            assert_independent(wrong, 0.1)
    with pytest.raises(AssertionError, match="rate"):
        assert_independent(masks, 0.11)


@pytest.mark.parametrize("name", MASKS)
def test_a_seed_repeats_its_masks_and_another_seed_gives_independent_ones(name):
    def masks(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack([MASKS[name](cpu, 64, 96, 0.3) for _ in range(2)])

    assert torch.equal(masks(3), masks(3))
    # Seeds that differ in a few bits.
    neighbours = torch.stack([masks(seed)[0] for seed in range(24)])
    assert_independent(neighbours, 0.3)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_each_operations_gradient_is_as_noisy_as_with_plain_pytorch(name, p):
    torch.manual_seed(11)
    fused, plain = (noise_of_rows(name, use, 2048, 64, p) for use in (cpu, ops))
    assert_same_noise(fused, plain, steps=2048, tolerance=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="mosaicbert"),
        pytest.param({"position": "learned", "ffn": "gelu"}, id="bert", marks=pytest.mark.nightly),
    ],
)
def test_one_steps_gradient_is_as_noisy_as_with_plain_pytorch(changes):
    """Every fused dropout takes part: after the embeddings, in the MLP, and in each residual sum."""
    inputs = padded(documents((12, 9, 12, 7)))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    noises = []
    for implementation in (cpu.CPU_OPS, ops.TORCH_OPS):
        model = small_model(hidden_dropout_prob=0.2, **changes).float().train()
        set_ops(model, implementation)
        torch.manual_seed(11)
        noises.append(gradient_noise(model, inputs, STEPS))
    assert_same_noise(*noises, steps=STEPS, tolerance=0.15)
