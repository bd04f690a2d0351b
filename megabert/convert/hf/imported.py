"""A model on its way from a folder of somebody's to one of ours."""

from typing import NamedTuple

from torch import Tensor

from megabert.model.configuration_megabert import MegaBertConfig


class Imported(NamedTuple):
    """initialized, left_out: parameters that the folder lacks or has in vain, by name. vocabulary: what a resizing did."""

    config: MegaBertConfig
    weights: dict[str, Tensor]
    initialized: list[str]
    left_out: list[str]
    vocabulary: str | None = None
