"""The masks of the Triton dropouts are as random as PyTorch's, and make a step's gradient as noisy."""

import pytest
import torch

from megabert.kernels.resolve import torch_ops, triton_ops
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.model.padding import Sequences
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.masks import MASKS, assert_independent, assert_same_noise, gradient_noise, noise_of_rows

interpreter.install()


@pytest.mark.parametrize(
    ("name", "p", "rows"),
    cases(
        per_push=[("geglu", 0.3, 24)],
        nightly=[(name, p, rows) for name in MASKS for p, rows in ((0.1, 96), (0.3, 24), (0.5, 96))],
    ),
)
def test_masks_of_layers_and_steps_are_independent(name, p, rows):
    torch.manual_seed(7)
    assert_independent(torch.stack([MASKS[name](triton_ops(), rows, 64, p) for _ in range(4)]), p)


def kept_by_attention(num_heads: int, length: int, p: float) -> torch.Tensor:
    """Return which weights are kept, (heads, queries, keys): with the identity as values they are the output."""
    plan = triton_ops().attention
    assert plan is not None
    attend = plan(Sequences(torch.tensor([0, length], dtype=torch.int32), length), None, length)
    qkv = torch.zeros(length, 3, num_heads, length)
    qkv[:, 2] = torch.eye(length)[:, None]
    return attend(qkv, p).transpose(0, 1) != 0


def test_masks_of_attention_are_independent_between_heads_queries_and_keys():
    torch.manual_seed(7)
    # (9, 32, 32): the heads of three layers.
    masks = torch.cat([kept_by_attention(3, 32, 0.3) for _ in range(3)])
    assert_independent(masks, 0.3)


@pytest.mark.parametrize("name", cases(per_push=[["geglu"]], nightly=[[name] for name in MASKS]))
def test_each_operations_gradient_is_as_noisy_as_with_plain_pytorch(name):
    torch.manual_seed(11)
    fused, plain = (noise_of_rows(name, use, 48, 16, 0.3) for use in (triton_ops(), torch_ops()))
    assert_same_noise(fused, plain, steps=48, tolerance=0.4)


@pytest.mark.nightly
def test_one_steps_gradient_is_as_noisy_as_with_plain_pytorch():
    shape = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16,
        "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2,
    }  # fmt: skip
    # A step takes two seconds in the interpreter.
    ids, noises, steps = torch.randint(5, 32, (1, 4)), [], 40
    torch.manual_seed(1)
    model = MegaBertForMaskedLM(MegaBertConfig(**shape)).train()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for implementation in (triton_ops(), torch_ops()):
        set_ops(model, implementation)
        noises.append(gradient_noise(model, {"input_ids": ids, "labels": ids}, steps))
    assert_same_noise(*noises, steps=steps, tolerance=0.5)
