"""Compute how many streams a run has, and which numbers of ranks can share its streams and its micro-batches."""

import math
from collections.abc import Sequence

# Without data.ranks, runs on few ranks have this many streams, so that they train on the same bins.
USUAL_STREAMS = 192
# Streams of one loader worker: a slow shard then delays one stream in eight.
STREAMS_PER_WORKER = 8
MOST_STREAMS = 1 << 20
# Tokens. Messages propose new sizes of batches in multiples of this, or of the longest document if that is more.
UNIT = 1024


def count_streams(ranks: Sequence[int], num_workers: int) -> int:
    """Return N, the streams of a new run that any of these numbers of ranks can share, each with whole workers.

    Raises ValueError if N would be above MOST_STREAMS.
    """
    workers = max(1, num_workers)
    step = math.lcm(USUAL_STREAMS, math.lcm(*ranks) * workers)
    num_streams = step * max(1, -(-STREAMS_PER_WORKER * max(ranks) * workers // step))
    if num_streams > MOST_STREAMS:
        raise ValueError(
            f"data.ranks {list(ranks)} with data.num_workers {num_workers} needs {num_streams:,} streams, more "
            f"than {MOST_STREAMS:,}: the least common multiple of {USUAL_STREAMS} and of ranks x workers. List fewer "
            "numbers in data.ranks, or numbers with more divisors in common."
        )
    return num_streams


def worker_count(requested: int, streams_per_rank: int) -> int:
    """Round down to a divisor of a rank's streams, so that every worker has whole streams."""
    return max((n for n in range(1, requested + 1) if streams_per_rank % n == 0), default=0)


def possible_ranks(*shared: int) -> list[int]:
    """Return the numbers of ranks that divide all of these counts of streams or micro-batches."""
    common = math.gcd(*shared)
    small = [number for number in range(1, math.isqrt(common) + 1) if common % number == 0]
    return sorted({*small, *(common // number for number in small)})


def describe(ranks: Sequence[int], near: int) -> str:
    """Name the numbers of ranks next to `near`: "48 or 64 ranks"."""
    below = [number for number in ranks if number < near][-2:]
    above = [number for number in ranks if number > near][:1]
    names = [str(number) for number in (*below, *above)]
    return f"{', '.join(names[:-1])}{' or ' if names[1:] else ''}{names[-1]} {'rank' if names == ['1'] else 'ranks'}"


def choose_streams(
    ranks: Sequence[int] | None,
    num_workers: int,
    world_size: int,
    saved: int | None,
    batches_per_step: Sequence[int] = (),
) -> int:
    """Choose the number of a run's data streams. ranks: data.ranks. saved: the number of a resumed run.

    Raises ValueError, naming numbers of ranks that work, if the ranks cannot share the streams evenly.
    """
    num_streams = saved or count_streams(ranks or [world_size], num_workers)
    if num_streams % world_size == 0:
        return num_streams
    others = describe(possible_ranks(num_streams, *batches_per_step), world_size)
    if saved is not None:
        raise ValueError(
            f"this run has {saved} data streams from its start to its end, which {world_size} ranks cannot share "
            f"evenly. Use {others}; a new run can list {world_size} in data.ranks."
        )
    raise ValueError(
        f"data.ranks {list(ranks or ())} gives {num_streams} data streams, which {world_size} ranks cannot share "
        f"evenly. Add {world_size} to data.ranks, or use {others}."
    )


def choose_batches_per_step(
    global_batch_tokens: int,
    micro_batch_tokens: int,
    longest: int,
    world_size: int,
    num_streams: int = 0,
    first_batch_tokens: int | None = None,
) -> int:
    """Return the micro-batches of one optimizer step over all ranks. longest: the least micro_batch_tokens.

    num_streams: of the run, which its ranks share too; 0: those that its number of ranks gives. first_batch_tokens: of
    a batch warm-up, which the advice changes where it must.

    Raises ValueError, naming what works, if the ranks cannot share them evenly.
    """
    total = global_batch_tokens // micro_batch_tokens
    if total % world_size == 0:
        return total

    def way(micro: int, batch: int) -> str:
        """Name the settings that these sizes of micro-batch and global batch change."""
        new = {"micro_batch_tokens": micro, "global_batch_tokens": batch}
        old = {"micro_batch_tokens": micro_batch_tokens, "global_batch_tokens": global_batch_tokens}
        if first_batch_tokens is not None:
            old["batch_warmup_from"] = first_batch_tokens
            new["batch_warmup_from"] = _first_batch(first_batch_tokens, micro, batch, world_size)
        *others, last = [f"data.{name} {size}" for name, size in new.items() if size != old[name]]
        return f"set {', '.join(others)}{' and ' if others else ''}{last}"

    first = 0 if first_batch_tokens is None else first_batch_tokens // micro_batch_tokens
    ways = []
    if micro := _fitting_micro_batch(global_batch_tokens, micro_batch_tokens, longest, world_size):
        ways.append(way(micro, global_batch_tokens))
    if total >= world_size:
        multiple = world_size * micro_batch_tokens
        ways.append(way(micro_batch_tokens, round(global_batch_tokens / multiple) * multiple))
    elif not micro:
        # A batch of that many micro-batches would be many times larger: rather give each rank one smaller micro-batch.
        unit = max(longest, min(UNIT, micro_batch_tokens))
        each = max(1, round(global_batch_tokens / world_size / unit)) * unit
        ways.append(way(each, each * world_size))
    raise ValueError(
        f"data.global_batch_tokens {global_batch_tokens} is {total} micro-batches of {micro_batch_tokens} tokens, "
        f"which {world_size} ranks cannot share evenly. To train on {world_size} ranks, {' or '.join(ways)}; or use "
        f"{describe(possible_ranks(total, first, num_streams), world_size)}."
    )


def _first_batch(tokens: int, micro_batch_tokens: int, global_batch_tokens: int, world_size: int) -> int:
    """Return the least batch, from `tokens` on, from which a warm-up can grow whose every step the ranks can share."""
    full = global_batch_tokens // micro_batch_tokens
    sizes = [size * micro_batch_tokens for size in possible_ranks(full) if size % world_size == 0]
    return next((size for size in sizes if size >= tokens), global_batch_tokens)


def micro_batch_sizes(
    global_batch_tokens: int, first_batch_tokens: int | None, longest: int, ranks: Sequence[int], most: int
) -> list[int]:
    """Return the micro-batches, of `longest` to `most` tokens, that the ranks can share evenly in each step.

    first_batch_tokens: of a batch warm-up. ranks: the present number of ranks, and others that the run may have, which
    count if they can share the batch at all. Raises ValueError, naming what works, if there is none.
    """
    batches = [batch for batch in (global_batch_tokens, first_batch_tokens) if batch is not None]
    shares = [batch // number for batch in batches for number in ranks if batch % number == 0]
    sizes = [size for size in possible_ranks(*shares) if longest <= size <= most] if shares else []
    if sizes and global_batch_tokens % ranks[0] == 0:
        return sizes
    unit = ranks[0] * max(longest, UNIT)
    batch = max(1, round(global_batch_tokens / unit)) * unit
    advice = f"data.global_batch_tokens {batch}"
    if first_batch_tokens is not None:
        first = _first_batch(first_batch_tokens, max(longest, UNIT), batch, ranks[0])
        advice += f" and data.batch_warmup_from {first}"
    raise ValueError(
        f"data.micro_batch_tokens auto: no number of tokens from {longest} to {most} divides data.global_batch_tokens "
        f"{global_batch_tokens} evenly between {ranks[0]} ranks. Set {advice}, or use "
        f"{describe(possible_ranks(*batches), ranks[0])}."
    )


def check_warmup(
    batches_per_step: Sequence[int], micro_batch_tokens: int, world_size: int, num_streams: int = 0
) -> None:
    """Raise ValueError, naming what works, if the ranks cannot share the steps of a batch warm-up evenly.

    batches_per_step: micro-batches of the steps of each stage, ascending. num_streams: as for choose_batches_per_step.
    """
    if all(size % world_size == 0 for size in batches_per_step):
        return
    first, full = (size * micro_batch_tokens for size in (batches_per_step[0], batches_per_step[-1]))
    raise ValueError(
        f"data.batch_warmup_from gives steps of {', '.join(map(str, batches_per_step))} micro-batches, which "
        f"{world_size} ranks cannot share evenly. Set data.batch_warmup_from "
        f"{_first_batch(first, micro_batch_tokens, full, world_size)}, or use "
        f"{describe(possible_ranks(*batches_per_step, num_streams), world_size)}."
    )


def _fitting_micro_batch(
    global_batch_tokens: int, micro_batch_tokens: int, longest: int, world_size: int
) -> int | None:
    """Return the largest micro-batch, up to the present one, that the ranks can share evenly; None if there is none."""
    share, rest = divmod(global_batch_tokens, world_size)
    fitting = [size for size in possible_ranks(share) if longest <= size <= micro_batch_tokens] if share else []
    return None if rest or not fitting else max(fitting)
