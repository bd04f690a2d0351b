"""List what GPUs can do at most, by the makers' data sheets: FLOP/s, memory and its bandwidth, links between GPUs."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """One kind of GPU.

    name: for the command line. pattern: torch's whole name of the card, without the maker. bf16, fp32: dense peaks in
    FLOP/s, fp32 without tensor cores, which is torch's default; bf16 is None where it is emulated. bandwidth: of its
    memory, bytes/s. memory: bytes. link: bytes/s in one direction to the other GPUs of a machine.
    """

    name: str
    pattern: str
    bf16: float | None
    fp32: float
    bandwidth: float
    memory: float
    link: float

    @property
    def fp8(self) -> float | None:
        """The dense peak in FP8, FLOP/s: twice that of bf16 since Hopper, Ada and MI300. None where there is none."""
        return None if self.bf16 is None or self.name.startswith(WITHOUT_FP8) else 2 * self.bf16

    @property
    def runs_kernels(self) -> bool:
        """Whether kernels/ runs on it, as kernels/resolve.py decides: on NVIDIA's cards with bf16."""
        return self.bf16 is not None and not self.name.startswith("mi")


# How the names of cards before Hopper, Ada and MI300 begin.
WITHOUT_FP8 = ("a", "v", "t", "rtx-a", "rtx-3", "mi2")


def card(name: str, pattern: str, tflops: tuple[float | None, float], memory: tuple[float, float], link: float) -> Card:
    """tflops: bf16 and fp32. memory: GB and GB/s. link: GB/s."""
    bf16, fp32 = tflops
    return Card(
        name=name,
        pattern=pattern,
        bf16=None if bf16 is None else bf16 * 1e12,
        fp32=fp32 * 1e12,
        memory=memory[0] * 1e9,
        bandwidth=memory[1] * 1e9,
        link=link * 1e9,
    )


# Memory of the cards sold as 80 GB and 40 GB: what torch reports, 81,082 and 40,339 MiB; of others the data sheet's.
# Links: NVLink in one direction, or PCIe. A card's name in torch ends where its pattern does: a part of a card (MIG) or
# a variant that is not here has no peak, rather than another's.
CARDS = [
    card("a100", r"A100(-SXM4-80GB|-SXM-80GB)", (312, 19.5), (85.0, 2039), 300),
    card("a100-40", r"A100-(SXM4|SXM)-40GB", (312, 19.5), (42.3, 1555), 300),
    card("a100-pcie", r"A100 80GB PCIe", (312, 19.5), (85.0, 1935), 32),
    card("a100-pcie-40", r"A100-PCIE-40GB", (312, 19.5), (42.3, 1555), 32),
    card("a800", r"A800-SXM4-80GB", (312, 19.5), (85.0, 2039), 200),
    card("h100", r"H100( SXM5)?( 80GB)?( HBM3)?", (989, 66.9), (85.0, 3350), 450),
    card("h100-pcie", r"H100 PCIe", (756, 51.2), (85.0, 2000), 64),
    card("h100-nvl", r"H100 NVL", (835, 60.0), (94, 3900), 300),
    card("h800", r"H800", (989, 66.9), (85.0, 3350), 200),
    card("h20", r"H20", (148, 44.0), (96, 4000), 450),
    card("h200", r"H200", (989, 66.9), (141, 4800), 450),
    card("h200-nvl", r"H200 NVL", (835, 60.0), (141, 4800), 450),
    card("gh200", r"GH200 (480GB|120GB)", (989, 66.9), (96, 4000), 450),
    card("b200", r"B200", (2250, 75.0), (180, 8000), 900),
    card("gb200", r"GB200", (2500, 80.0), (186, 8000), 900),
    card("b300", r"B300( SXM6( AC)?)?", (2250, 75.0), (270, 8000), 900),
    card("gb300", r"GB300", (2500, 80.0), (279, 8000), 900),
    card("a10", r"A10", (125, 31.2), (24, 600), 32),
    card("a10g", r"A10G", (70, 35.0), (24, 600), 32),
    card("a30", r"A30", (165, 10.3), (24, 933), 100),
    card("a40", r"A40", (149.7, 37.4), (48, 696), 56),
    card("l4", r"L4", (121, 30.3), (24, 300), 32),
    card("l40", r"L40", (181, 90.5), (48, 864), 32),
    card("l40s", r"L40S", (362, 91.6), (48, 864), 32),
    card("rtx-a6000", r"RTX A6000", (154.8, 38.7), (48, 768), 56),
    card("rtx-6000-ada", r"RTX 6000 Ada Generation", (364, 91.1), (48, 960), 32),
    card("rtx-3090", r"GeForce RTX 3090", (71, 35.6), (24, 936), 56),
    card("rtx-4090", r"GeForce RTX 4090", (165, 82.6), (24, 1008), 32),
    card("rtx-5090", r"GeForce RTX 5090", (209.5, 104.8), (32, 1792), 64),
    card("v100", r"(Tesla )?V100-SXM2-16GB", (None, 15.7), (16, 900), 150),
    card("v100-32", r"(Tesla )?V100-SXM2-32GB(-LS)?", (None, 15.7), (32, 900), 150),
    card("t4", r"(Tesla )?T4", (None, 8.1), (16, 320), 16),
    card("mi250x", r"Instinct MI250X.*", (191.5, 23.9), (64, 1638), 100),
    card("mi300x", r"Instinct MI300X.*", (1307, 163.4), (192, 5300), 448),
]


def find_card(device_name: str) -> Card | None:
    """Return the card of torch's name, such as "NVIDIA H100 80GB HBM3"; None for a card that is not in the table."""
    bare = re.sub(r"^(NVIDIA|AMD) ", "", device_name.strip())
    return next((card for card in CARDS if re.fullmatch(card.pattern, bare)), None)


def card_named(name: str) -> Card:
    """Return the card of a command line's name. Raises ValueError for another name."""
    found = next((card for card in CARDS if card.name == name.lower()), None)
    if found is None:
        raise ValueError(f"no GPU is called {name} here, expected one of: {', '.join(card.name for card in CARDS)}.")
    return found
