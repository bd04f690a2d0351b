"""Find the micro-batch that data.micro_batch_tokens auto stands for: the largest that a card's memory holds."""

from collections.abc import Callable

from megabert.config.data_section import DataConfig
from megabert.data.ranks import micro_batch_sizes
from megabert.files.disk import format_bytes
from megabert.training.micro_batch.memory import Memory

# A larger micro-batch is not faster: the host's work for one, and the waits of a step, are then hidden.
MOST_TOKENS = 1 << 17
# The same on a CPU, whose memory no formula here describes.
MOST_TOKENS_ON_CPU = 1 << 14


def possible_micro_batches(data: DataConfig, world_size: int, most: int) -> list[int]:
    """Return, ascending, the micro-batches up to `most` tokens that divide the global batch between the ranks.

    One piece of a document must fit. Raises ValueError, naming what works, if there is none.
    """
    assert data.global_batch_tokens != "auto", "data.micro_batch_tokens and data.global_batch_tokens are both auto"
    ranks = [world_size, *(data.ranks or [])]
    longest = data.longest
    return micro_batch_sizes(data.global_batch_tokens, data.batch_warmup_from, longest, ranks, max(most, longest))


def micro_batch_on_cpu(data: DataConfig, world_size: int) -> int:
    """Return the tokens of a micro-batch on CPUs."""
    return possible_micro_batches(data, world_size, MOST_TOKENS_ON_CPU)[-1]


def largest_micro_batch(
    data: DataConfig, world_size: int, memory_of: Callable[[int], Memory], card_bytes: float
) -> int:
    """Return the tokens of the largest micro-batch that fits.

    memory_of: the memory of a rank by the tokens of its micro-batch. card_bytes: of the smallest card. Raises
    ValueError, naming what helps, if there is none.
    """
    sizes = possible_micro_batches(data, world_size, MOST_TOKENS)
    for size in reversed(sizes):
        if memory_of(size).fits(card_bytes):
            return size
    raise ValueError(
        f"data.micro_batch_tokens auto: even {sizes[0]} tokens need about {format_bytes(memory_of(sizes[0]).total)}, "
        f"and the card has {format_bytes(card_bytes)}. Set model.gradient_checkpointing every_layer, use "
        "ds_configs/zero3.json, shorten data.max_seq_len, or set data.micro_batch_tokens to a number to try it."
    )
