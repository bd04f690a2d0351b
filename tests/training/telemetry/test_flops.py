"""FLOPs of a step, and the peak of a device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.telemetry.flops import peak_flops, step_flops


@pytest.mark.parametrize(("ffn", "position"), [("geglu", "alibi"), ("gelu", "learned")])
def test_the_count_equals_torchs_flop_counter(ffn, position):
    """For forward and backward of two documents. Only the eager attention uses plain matrix products."""
    config = MegaBertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, ffn=ffn,
        position=position, attn_implementation="eager", hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = MegaBertForMaskedLM(config)
    lengths, masked = [20, 44], 10
    ids = torch.randint(5, 97, (64,))
    cu_seqlens = torch.tensor([0, 20, 64], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.arange(masked) * 6
    with FlopCounterMode(display=False) as counter:
        model.masked_loss(ids, positions, cu_seqlens, 44, rows, ids[rows]).loss_sum.backward()
    expected = step_flops(config, 64, masked, sum(length**2 for length in lengths))
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_peaks_of_a_cpu_and_of_cards():
    config = MegaBertConfig(hidden_size=128, intermediate_size=256, num_attention_heads=2)
    cpu = peak_flops(torch.device("cpu"), "cpu", config, torch.float32)
    assert cpu is not None
    assert 1e8 < cpu < 1e14
    cuda = torch.device("cuda")
    assert peak_flops(cuda, "NVIDIA H100 80GB HBM3", config, torch.bfloat16) == 989e12
    assert peak_flops(cuda, "NVIDIA H100 PCIe", config, torch.bfloat16) == 756e12
    assert peak_flops(cuda, "NVIDIA A100-SXM4-80GB", config, torch.bfloat16) == 312e12
    assert peak_flops(cuda, "An unknown card", config, torch.bfloat16) is None
