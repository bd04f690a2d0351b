"""FLOPs of a step, and the peak of a device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.telemetry.cards import CARDS, card_named
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


def test_the_peak_of_a_cpu_is_measured():
    config = MegaBertConfig(hidden_size=128, intermediate_size=256, num_attention_heads=2)
    cpu = peak_flops(torch.device("cpu"), "cpu", config, torch.float32)
    assert cpu is not None
    assert 1e8 < cpu < 1e14


CUDA_CONFIG = MegaBertConfig()


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51.2e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA H200", 989e12, 66.9e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("Tesla T4", None, 8.1e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA H100X", None, None),
        ("NVIDIA L4000", None, None),
        ("An unknown card", None, None),
    ],
)
def test_a_card_has_its_own_peak_in_the_precision_of_the_run_or_none(caplog, name, bf16, fp32):
    caplog.set_level("INFO")
    for dtype, peak in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        caplog.clear()
        assert peak_flops(torch.device("cuda"), name, CUDA_CONFIG, dtype) == (peak and pytest.approx(peak))
        assert (f"no MFU is reported: telemetry/cards.py knows no {dtype} peak of {name}" in caplog.messages) == (
            peak is None
        )


def test_names_for_the_command_line_are_distinct():
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert card_named("H100").bandwidth == 3.35e12
    with pytest.raises(ValueError, match=r"no GPU is called h1000 here, expected one of: a100, .*, mi300x\."):
        card_named("h1000")
