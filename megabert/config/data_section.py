"""Define the recipe's section `data`: corpora, the lengths of pieces, and the batches that they are packed into."""

from dataclasses import dataclass
from typing import Literal

from megabert.config.settings import check_limits, check_once, required, setting


@dataclass(frozen=True, kw_only=True)
class CorpusPart:
    """One corpus of a mixture."""

    shards: str
    """as data.train"""
    weight: float = setting(1.0, "(0, 1e9]")
    """share of the tokens, relative to the other weights"""

    def __post_init__(self):
        check_limits(self)
        if not self.shards:
            raise ValueError("shards is empty, expected a value.")


@dataclass(frozen=True, kw_only=True)
class LengthPhase:
    """A part of a run with one maximum length."""

    max_seq_len: int = required("[3, 1048576]")
    """longest piece of a document, tokens"""
    until: float = required("(0, 1]")
    """share of the run's steps at which this phase ends"""

    def __post_init__(self):
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class DataPhase:
    """A part of a run with its own data; what it leaves out is as in the recipe."""

    until: float = required("(0, 1]")
    """share of the run's steps at which this phase ends"""
    train: list[CorpusPart] | str | None = None
    """as data.train"""
    max_seq_len: int | None = setting(None, "[3, 1048576]")
    """longest piece of a document, tokens"""
    mlm_probability: float | None = setting(None, "(0, 1)")
    """as masking.mlm_probability"""

    def __post_init__(self):
        check_limits(self)
        if self.train is not None and not self.train:
            raise ValueError("train is empty, expected a value.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The shards, and how documents are packed into batches."""

    train: list[CorpusPart] | str = setting("data/quickstart/tokens", may_change=True)
    """shards: a folder with a manifest.json, or tar files in brace notation; local, a URL, or pipe:COMMAND. A list of
    {shards, weight} mixes several corpora"""
    heldout: str | None = setting(None, may_change=True)
    """shards to evaluate on; default: the held-out split of data.train"""
    tokenizer: str | None = setting(None, may_change=True)
    """tokenizer.json, or a folder with one, for shards that hold text"""
    max_seq_len: list[LengthPhase] | int = setting(128, "[3, 1048576]")
    """longest piece of a document, tokens, including [CLS] and [SEP]. A list of {max_seq_len, until} changes it during
    the run; the last until is 1"""
    phases: list[DataPhase] | None = None
    """parts of the run with their own data, as {until, train, max_seq_len, mlm_probability}; the last until is 1"""
    documents: Literal["split", "truncate"] = "split"
    """what to do with longer documents: split them evenly into pieces, or truncate them to the first piece"""
    micro_batch_tokens: int | Literal["auto"] = setting(65_536, "[3, 2^24]")
    """tokens per bin: the batch that one rank computes at once. auto: as many as the card's memory holds, by a formula;
    a resumed run keeps them"""
    global_batch_tokens: int | Literal["auto"] = setting(524_288, "[1, 2^40]")
    """slots (padding counted) per optimizer step over all ranks; auto: micro_batch_tokens x ranks (for the
    quickstart)"""
    batch_warmup: float = setting(0.0, "[0, 1)")
    """share of the steps in which the batch grows from batch_warmup_from to global_batch_tokens, in equal stages"""
    batch_warmup_from: int | None = setting(None, "[1, 2^40]")
    """slots (padding counted) of the first steps; must divide global_batch_tokens"""
    max_documents: int | Literal["auto"] = setting("auto", "[1, 2^24]")
    """most pieces in one bin, filler sequences counted; auto: the mean by the lengths of the corpus, and a quarter
    more, or four square roots of it more if that is larger. A resumed run keeps it"""
    num_workers: int = setting(2, "[0, 256]", may_change=True)
    """loader processes per rank, rounded down to a divisor of streams / ranks; 0: pack in the training process"""
    ranks: list[int] | None = setting(None, may_change=True)
    """numbers of ranks that the run may have, such as [48, 56, 64]; default: what it starts with and divisors of N"""
    on_bad_shard: Literal["stop", "skip"] = setting("stop", may_change=True)
    """what to do with a damaged chunk of a shard: stop the run, or skip the chunk, count it and log it"""
    cache_dir: str = setting("~/.cache/megabert/shards", may_change=True, is_output=True)
    """folder on a local disk for shards, or blocks of them, that come from a store, a server or a command"""
    store_patience_s: float = setting(900.0, "[1, 86400]", may_change=True)
    """how long to try again where a store or a server fails, seconds; then the run ends with exit code 75"""
    cache_gb: int = setting(64, "[1, 1048576]", may_change=True)
    """size limit of cache_dir, GiB; should hold one shard per stream of this machine's ranks"""

    def __post_init__(self):
        check_limits(self, "data.")
        name = "max_seq_len" if self.phases is None else "phases"
        if self.phases is not None and not isinstance(self.max_seq_len, int):
            raise ValueError("data.phases and data.max_seq_len both list phases. Put the lengths into data.phases.")
        untils = [until for _, until in self.lengths]
        if not self.lengths or untils != sorted({*untils}) or untils[-1] != 1:
            raise ValueError(f"data.{name} has phases until {untils}, expected rising shares, the last of them 1.")
        if self.micro_batch_tokens != "auto" and self.micro_batch_tokens < self.longest:
            raise ValueError(
                f"data.micro_batch_tokens is {self.micro_batch_tokens}, "
                f"expected at least data.max_seq_len ({self.longest})."
            )
        for train in (self.train, *(phase.train for phase in self.phases or ())):
            if isinstance(train, str) and train.startswith("["):
                raise ValueError(
                    f"data.train is {train}, expected a path or a list of {{shards: PATH, weight: NUMBER}}."
                )
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1):
            raise ValueError(f"data.ranks is {self.ranks}, expected numbers of ranks from 1 on, such as [48, 64].")
        check_once("data.ranks", self.ranks or ())
        if not self.corpora:
            raise ValueError("data.train is an empty list, expected at least one corpus.")
        self._check_batch()

    def _check_batch(self) -> None:
        full, first = self.global_batch_tokens, self.batch_warmup_from
        # auto divides them.
        micro = 1 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens
        if self.micro_batch_tokens == full == "auto":
            raise ValueError(
                "data.micro_batch_tokens and data.global_batch_tokens are both auto, expected a number for one of them."
            )
        if full != "auto" and full % micro:
            raise ValueError(
                f"data.global_batch_tokens is {full}, expected a multiple of data.micro_batch_tokens ({micro})."
            )
        if (first is None) != (self.batch_warmup == 0):
            raise ValueError(
                f"data.batch_warmup is {self.batch_warmup} and data.batch_warmup_from {first}, "
                "expected both or neither."
            )
        if first is not None and (full == "auto" or first % micro or full % first):
            raise ValueError(
                f"data.batch_warmup_from is {first}, expected a multiple of data.micro_batch_tokens ({micro}) "
                f"that divides data.global_batch_tokens ({full})."
            )

    @property
    def bin_tokens(self) -> int:
        """micro_batch_tokens, once training/micro_batch/choose.py has chosen a number for auto."""
        assert self.micro_batch_tokens != "auto", (
            "data.micro_batch_tokens auto was used before a number was chosen for it"
        )
        return self.micro_batch_tokens

    @property
    def corpora(self) -> list[tuple[str, float]]:
        """(location, weight) of each corpus of the first phase."""
        return self.mixtures[0]

    @property
    def mixtures(self) -> list[list[tuple[str, float]]]:
        """The different mixtures of the run in order, each as (location, weight) of its corpora."""
        found: list[list[tuple[str, float]]] = []
        for mixture in self._mixture_of_phases:
            if mixture not in found:
                found.append(mixture)
        return found

    @property
    def mixture_numbers(self) -> list[int]:
        """The number of each phase's mixture in `mixtures`."""
        return [self.mixtures.index(mixture) for mixture in self._mixture_of_phases]

    @property
    def _mixture_of_phases(self) -> list[list[tuple[str, float]]]:
        if self.phases is None:
            return [_parts(self.train)] * len(self.lengths)
        return [_parts(self.train if phase.train is None else phase.train) for phase in self.phases]

    @property
    def lengths(self) -> list[tuple[int, float]]:
        """(max_seq_len, share of the run at which it ends) of each phase."""
        if self.phases is not None:
            assert isinstance(self.max_seq_len, int), (
                f"data.max_seq_len is {self.max_seq_len}, a list, beside data.phases"
            )
            return [(phase.max_seq_len or self.max_seq_len, phase.until) for phase in self.phases]
        if isinstance(self.max_seq_len, int):
            return [(self.max_seq_len, 1.0)]
        return [(phase.max_seq_len, phase.until) for phase in self.max_seq_len]

    @property
    def longest(self) -> int:
        """Longest piece of any phase, tokens."""
        return max(length for length, _ in self.lengths)


def _parts(train: list[CorpusPart] | str) -> list[tuple[str, float]]:
    return [(train, 1.0)] if isinstance(train, str) else [(part.shards, part.weight) for part in train]
