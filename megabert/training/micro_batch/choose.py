"""Choose data.micro_batch_tokens for auto when a run first starts; later starts keep it."""

import logging
from dataclasses import dataclass, replace

import torch

from megabert.config.ds_config import DsConfig
from megabert.config.ds_schema import ZeroOptimization
from megabert.config.recipe import Recipe
from megabert.files.checkpoint_format import State
from megabert.files.disk import format_bytes
from megabert.kernels.devices import has_fast_bf16
from megabert.kernels.resolve import why_not_all_fused
from megabert.training.architecture import architecture_of
from megabert.training.checkpointing import find
from megabert.training.corpora import choose_max_documents, open_corpora
from megabert.training.distributed.device import memory_bytes, training_device
from megabert.training.distributed.sync import broadcast_from_rank0, gather_dicts
from megabert.training.micro_batch.batch import largest_batch
from megabert.training.micro_batch.memory import Execution, Formats, Memory, memory_of_rank
from megabert.training.micro_batch.sizes import largest_micro_batch, micro_batch_on_cpu

log = logging.getLogger(__name__)


def resolve_micro_batch(recipe: Recipe, ds_config: DsConfig, rank: int, world_size: int) -> Recipe:
    """Return the recipe with a number for data.micro_batch_tokens; every rank calls this and gets the same one.

    This precedes the plan, whose batches and steps follow from the number; a choice by the corpus opens it for itself.
    Raises ValueError if no micro-batch, or not that of the run's checkpoint, fits into the ranks' memory.
    """
    if recipe.data.micro_batch_tokens != "auto":
        return recipe
    device = training_device()
    bf16 = ds_config.computes_in_bf16(has_fast_bf16(device))
    found = gather_dicts({rank: (memory_bytes(device), _runs_fused(recipe, device, bf16))})
    cards = [card for card, _ in found.values() if card is not None]
    fused = all(fused for _, fused in found.values())
    chooser = MicroBatchChooser(recipe, ds_config, world_size, min(cards) if cards else None, bf16, fused)
    tokens = broadcast_from_rank0(chooser.choose, rank, world_size)
    return recipe.with_micro_batch(tokens)


def _runs_fused(recipe: Recipe, device: torch.device, bf16: bool) -> bool:
    """Return whether all operations on this rank's card use our kernels; PyTorch's keep more activations."""
    if device.type == "cpu" or recipe.run.ops == "torch":
        return False
    return why_not_all_fused(device, architecture_of(recipe.model, 1), bf16) is None


@dataclass(frozen=True)
class MicroBatchChooser:
    """Chooses for a run on world_size ranks.

    card_bytes: memory of the smallest card; None on CPUs. bf16: whether activations are in bf16. fused: whether all
    operations are our kernels on every rank.
    """

    recipe: Recipe
    ds_config: DsConfig
    world_size: int
    card_bytes: float | None
    bf16: bool
    fused: bool

    def choose(self) -> int:
        """Return the number of the run's checkpoint, or the largest that fits. Call on one rank."""
        saved = find.saved_state(self.recipe.run)
        return self._new() if saved is None else self._kept(saved)

    def _new(self) -> int:
        if self.card_bytes is None:
            tokens = micro_batch_on_cpu(self.recipe.data, self.world_size)
            log.info("data.micro_batch_tokens auto is %d on CPUs", tokens)
            return tokens
        corpus, _ = open_corpora(self.recipe.data)
        multiple = self.recipe.model.pad_vocab_to_multiple_of
        vocab_size = -(-corpus.tokenizer.vocab_size // multiple) * multiple

        def memory_of(tokens: int) -> Memory:
            documents = choose_max_documents(self.recipe.with_micro_batch(tokens).data, corpus, None)
            return self._memory(tokens, documents, vocab_size, self.zero)

        tokens = largest_micro_batch(self.recipe.data, self.world_size, memory_of, self.card_bytes)
        needed = format_bytes(memory_of(tokens).total)
        log.info("data.micro_batch_tokens auto is %d: about %s of %s", tokens, needed, format_bytes(self.card_bytes))
        return tokens

    def _kept(self, saved: State) -> int:
        """Return a checkpoint's number. Raises ValueError, naming what helps, if it does not fit."""
        tokens = int(saved.recipe["data"]["micro_batch_tokens"])
        documents, vocab_size = saved.max_documents or {}, saved.model["vocab_size"]
        needed = self._memory(tokens, documents, vocab_size, self.zero)
        if self.card_bytes is None or needed.fits(self.card_bytes):
            log.info("data.micro_batch_tokens auto is %d, as in the checkpoint", tokens)
            return tokens
        zero2 = self._memory(tokens, documents, vocab_size, replace(self.zero, stage=2))
        other = "use ds_configs/zero2.json, " if self.zero.stage == 1 and zero2.fits(self.card_bytes) else ""
        raise ValueError(
            f"data.micro_batch_tokens auto: the run's checkpoint has {tokens}, which a resumed run keeps and which "
            f"needs about {format_bytes(needed.total)} at ZeRO {self.zero.stage} on {self.world_size} ranks; the card "
            f"has {format_bytes(self.card_bytes)}. To resume, {other}use cards with more memory, or set "
            f"data.micro_batch_tokens {tokens} to try it; or start anew with --run.resume none."
        )

    @property
    def zero(self) -> ZeroOptimization:
        return self.ds_config.values.zero_optimization

    def _memory(self, tokens: int, max_documents: dict[int, int], vocab_size: int, zero: ZeroOptimization) -> Memory:
        return memory_of_rank(
            self.recipe.model,
            largest_batch(self.recipe, tokens, max_documents),
            Execution.of(self.recipe.run, self.bf16, self.fused),
            vocab_size=vocab_size,
            zero=zero,
            ranks=self.world_size,
            formats=Formats.of(self.ds_config.values),
        )
