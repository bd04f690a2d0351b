"""Check a run on some number of ranks without starting it, from its batches to its memory; imports no torch."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from megabert.config.cli import exit_code
from megabert.config.ds_config import DsConfig, ResolvedDsConfig
from megabert.config.recipe import Recipe
from megabert.data.bin_shape import check_max_documents
from megabert.data.packing import SPECIALS_PER_PIECE, pieces_per_token
from megabert.data.ranks import choose_streams, possible_ranks, worker_count
from megabert.data.shards.retry import LONGER, StoreAwayError
from megabert.data.shards.source import Corpus, Source
from megabert.files import checkpoint_format
from megabert.files.checkpoint_format import State
from megabert.files.disk import format_bytes
from megabert.files.json_file import read_json
from megabert.files.redact import redact
from megabert.training.checkpointing import find
from megabert.training.checkpointing.initial_folder import (
    check_folder,
    check_settings,
    check_vocabulary,
    check_vocabulary_of_checkpoint,
)
from megabert.training.corpora import choose_max_documents, open_corpora
from megabert.training.identity import RunIdentity, check_branch, check_same_run
from megabert.training.micro_batch.batch import batch_of_web_pages, largest_batch
from megabert.training.micro_batch.memory import Execution, Formats, Memory, memory_of_rank, num_weights
from megabert.training.micro_batch.sizes import largest_micro_batch
from megabert.training.run_schedule import RunSchedule, make_run_schedule, shared_batches
from megabert.training.telemetry.cards import CARDS, Card
from megabert.training.unsupported import check_compile_and_fp8, choose_cuda_graphs, why_no_trackers
from megabert.training.updates.unsupported_optimizers import why_not_optimizer

# A user waits for the answer, so a store gets less time than in a run.
STORE_PATIENCE_S = 10.0
# data.micro_batch_tokens auto is shown for GPUs of this memory, bytes.
USUAL_GPU = 80e9


class Finding(NamedTuple):
    """A line of a dry run. code: the exit code of the run that would be refused for it, or 0."""

    part: str
    text: str
    code: int = 0

    def __str__(self) -> str:
        return f"{self.part:11} {'REFUSED: ' if self.code else ''}{redact(self.text)}"


def dry_run(recipe: Recipe, ds_config: DsConfig, ranks: int) -> Iterator[Finding]:
    """Say what a run would do on this number of ranks, and every reason to refuse it.

    A part that needs another one which is refused is left out.
    """
    if ranks < 1:
        raise ValueError(f"--dry-run is {ranks}, expected a number of ranks from 1 on.")
    checks, refused = Checks(recipe, ds_config, ranks), 0
    for name, part in checks.parts():
        try:
            for line in part():
                yield Finding(name, line)
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
            if isinstance(error, StoreAwayError):
                message = f"{message.removesuffix(LONGER)}. A dry run waits no longer, a run for data.store_patience_s."
            yield Finding(name, message, exit_code(error))
    yield Finding("result", f"{refused} refused" if refused else f"can start on {ranks:,} ranks")


@dataclass
class Checks:
    """The parts of a dry run. Each yields lines, or raises ValueError for what a run would refuse."""

    recipe: Recipe
    ds_config: DsConfig
    ranks: int
    schedule: RunSchedule | None = None
    resolved: ResolvedDsConfig | None = None
    corpus: Corpus | None = None
    start: Path | None = None
    """the checkpoint that the run starts from"""
    saved: State | None = None
    branched: bool = False

    def parts(self) -> list[tuple[str, Callable[[], Iterator[str]]]]:
        return [
            ("batches", self.batches),
            ("settings", self.settings),
            ("corpus", self.corpora),
            ("checkpoint", self.checkpoint),
            ("streams", self.streams),
            ("weights", self.initial_weights),
            ("disk", self.disk),
            ("memory", self.memory),
        ]

    def batches(self) -> Iterator[str]:
        if self.recipe.data.micro_batch_tokens == "auto":
            yield self._choose_micro_batch()
        data = self.recipe.data
        self.schedule = schedule = make_run_schedule(self.recipe, self.ranks)
        sizes = schedule.stages.batches_per_step
        yield (
            f"a step: {_range(sizes)} micro-batches of {data.bin_tokens:,} tokens, "
            f"{_range([size // self.ranks for size in sizes])} on each of {self.ranks} ranks"
        )
        if schedule.timed is None:
            slots = schedule.stages.bins_before(schedule.total_steps) * data.bin_tokens
            yield f"the run: {schedule.total_steps:,} steps, {_number(slots)} tokens"
        else:
            yield f"the run: {self.recipe.run.max_hours:g} hours"

    def _choose_micro_batch(self) -> str:
        """Put a number in place of data.micro_batch_tokens auto. Returns a line about it."""
        saved = find.saved_state(self.recipe.run)
        if saved is not None:
            tokens, where = int(saved.recipe["data"]["micro_batch_tokens"]), "as in the run's checkpoint"
        else:
            tokens = largest_micro_batch(self.recipe.data, self.ranks, self._memory_of, USUAL_GPU)
            where = f"on GPUs of {format_bytes(USUAL_GPU)}; each run chooses by its own GPUs"
        self.recipe = self.recipe.with_micro_batch(tokens)
        return f"data.micro_batch_tokens auto: {tokens:,} {where}"

    def _memory_of(self, tokens: int, card: Card | None = None) -> Memory:
        """Predict the memory of a rank for a micro-batch; where the corpus is not known, with documents of the web.

        card: by default one that multiplies bf16 natively and runs our kernels.
        """
        recipe = self.recipe
        if self.corpus is None:
            batch = batch_of_web_pages(recipe, tokens)
        else:
            batch = largest_batch(recipe, tokens, choose_max_documents(recipe.data, self.corpus, self.saved))
        bf16 = self.ds_config.computes_in_bf16(fast_bf16=card is None or card.bf16 is not None)
        fused = recipe.run.ops != "torch" and (card is None or card.runs_kernels)
        return memory_of_rank(
            recipe.model,
            batch,
            Execution.of(recipe.run, bf16, fused),
            vocab_size=self._vocab_size(),
            zero=self.ds_config.values.zero_optimization,
            ranks=self.ranks,
            formats=Formats.of(self.ds_config.values),
        )

    def settings(self) -> Iterator[str]:
        if problem := why_no_trackers(self.recipe.run.trackers):
            raise ValueError(problem)
        if self.schedule is None:
            return
        resolved = self.ds_config.resolve(
            accumulation=self.schedule.batches_per_step // self.ranks,
            max_grad_norm=self.recipe.optimizer.max_grad_norm,
            world_size=self.ranks,
            fast_bf16=True,
        )
        check_compile_and_fp8(self.recipe, resolved, "cuda", has_fp8=True)
        if problem := why_not_optimizer(self.recipe.optimizer, resolved):
            raise ValueError(problem)
        choose_cuda_graphs(self.recipe, resolved, "cuda", lambda: None)
        self.resolved = resolved
        precision = "bf16 where the GPUs multiply it natively" if resolved.bf16 else "fp32"
        yield f"ZeRO {resolved.zero_stage}, {precision}, {self.recipe.optimizer.name}"
        if self.recipe.probe.task is not None:
            yield "the probe's task and data are not checked"

    def corpora(self) -> Iterator[str]:
        data = self.recipe.data
        data = replace(data, store_patience_s=min(data.store_patience_s, STORE_PATIENCE_S))
        corpus, held_out = open_corpora(data)
        for number, source in enumerate(corpus.sources):
            share = self._share(corpus, number)
            shown = f", {100 * share:.1f} % of the run" if len(corpus.sources) > 1 else ""
            yield f"{source.folder}: {_contents(source)}{shown}{self._passes(source, share)}"
        yield f"held-out: {', '.join(_contents(source) for source in held_out.sources)}"
        info = corpus.tokenizer
        yield f"tokenizer: {info.vocab_size:,} ids, fingerprint {info.fingerprint[:12]}, the same for all shards"
        self.corpus = corpus

    def _share(self, corpus: Corpus, source: int) -> float:
        """Return a source's share of the tokens of the run, over all its phases."""
        data, begin, share = self.recipe.data, 0.0, 0.0
        for (_, until), mixture in zip(data.lengths, data.mixture_numbers, strict=True):
            share += (until - begin) * corpus.mixture(mixture)[source]
            begin = until
        return share

    def _passes(self, source: Source, weight: float) -> str:
        """Say how often the run reads a source; "" where that is not known."""
        known = source.document_lengths()
        if self.schedule is None or self.schedule.timed is not None or known is None:
            return ""
        data, (lengths, documents) = self.recipe.data, known
        longest = data.lengths[-1][0]
        if data.documents == "truncate":
            lengths = lengths.clip(max=longest - SPECIALS_PER_PIECE)
        own = float(lengths @ documents)
        specials = SPECIALS_PER_PIECE * pieces_per_token(*known, longest, data.documents == "truncate")
        # Text is known from a sample, and its size in characters.
        if source.tokenizer_path is not None:
            return ""
        slots = self.schedule.stages.bins_before(self.schedule.total_steps) * data.bin_tokens
        return f"; read {weight * slots * (1 - specials) / max(1.0, own):.2f} times"

    def checkpoint(self) -> Iterator[str]:
        run = self.recipe.run
        folder = Path(run.output_dir) / "checkpoints"
        path = find.find(run.resume, folder, _check_sizes)
        if path is None and run.branch_from is not None:
            path, self.branched = find.find(run.branch_from, folder, _check_sizes), True
        if path is None:
            yield f"none in {folder}: the run starts at step 0"
            return
        file = path / checkpoint_format.STREAMS
        checkpoint_format.check_streams_format(read_json(file), str(file), new_pass=self.branched)
        state = checkpoint_format.read_state(path)
        if self.corpus is not None and self.schedule is not None and self.resolved is not None:
            check = check_branch if self.branched else check_same_run
            check(path, state, self._identity(state, self.schedule, self.resolved), self.corpus.fingerprint)
            check_vocabulary_of_checkpoint(path, self.corpus)
        self.start, self.saved = path, state
        yield f"{'branches off' if self.branched else 'resumes'} from {path}: step {state.step:,}, hashes not compared"
        if self.resolved is not None and self.resolved.zero_stage and state.world_size != self.ranks:
            yield f"written by {state.world_size} ranks: it is converted first, which takes its bytes twice on the disk"

    def _identity(self, saved: State, schedule: RunSchedule, resolved: ResolvedDsConfig) -> RunIdentity:
        """Return this run's identity; what only the device decides is taken from the checkpoint."""
        if self.ds_config.values.torch_autocast.enabled == "auto":
            resolved = resolved.with_autocast(ResolvedDsConfig(saved.ds_config).bf16)
        return RunIdentity.of_run(
            self.recipe,
            resolved,
            saved.optimizer_source,
            batches_per_step=schedule.batches_per_step,
            total_steps=schedule.total_steps,
            world_size=self.ranks,
        )

    def streams(self) -> Iterator[str]:
        data, saved = self.recipe.data, self.saved
        batches = [] if self.schedule is None else shared_batches(self.recipe.data, self.schedule)
        count = choose_streams(data.ranks, data.num_workers, self.ranks, saved.num_streams if saved else None, batches)
        each = count // self.ranks
        yield f"{count:,} data streams, {each:,} a rank, read by {worker_count(data.num_workers, each)} loader workers"
        possible = possible_ranks(count, *batches)
        yield f"this run can resume on {', '.join(map(str, possible))} ranks"
        if data.micro_batch_tokens == "auto":
            # No number was found, which "batches" says; what follows needs one.
            return
        if missing := [number for number in data.ranks or () if number not in possible]:
            multiple = math.lcm(*(data.ranks or ()), self.ranks) * data.bin_tokens
            yield (
                f"NOT on {', '.join(map(str, missing))} ranks of data.ranks, which cannot share a step evenly: set "
                f"data.global_batch_tokens to a multiple of {multiple:,} for that"
            )
        if self.corpus is not None:
            for length, most in choose_max_documents(data, self.corpus, saved).items():
                check_max_documents(most, data.bin_tokens, length)

    def initial_weights(self) -> Iterator[str]:
        name = self.recipe.model.init_from
        if name is None or self.saved is not None:
            return
        folder = Path(name)
        model = self.recipe.model
        check_settings(folder, check_folder(folder), vars(model) | {"type_vocab_size": model.num_token_types})
        if self.corpus is not None:
            check_vocabulary(folder, self.corpus.sources[0])
        yield f"{folder}: its settings and vocabulary are the recipe's and the corpus's; its weights are not read"

    def disk(self) -> Iterator[str]:
        run = self.recipe.run
        out = Path(run.output_dir).absolute()
        there = next(path for path in (out, *out.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{there}: checkpoints cannot be written here. Choose another run.output_dir.")
        stage = self.resolved.zero_stage if self.resolved is not None else 1
        size = checkpoint_format.bytes_of(num_weights(self.recipe.model, self._vocab_size()), stage)
        free = shutil.disk_usage(there).free
        if size > free:
            raise ValueError(
                f"{out}: a checkpoint needs {format_bytes(size)}, {format_bytes(free)} are free. Free some space, or "
                "choose another run.output_dir."
            )
        count = run.keep_checkpoints + 1
        if run.keep_every_steps and self.schedule is not None and self.schedule.timed is None:
            count += self.schedule.total_steps // run.keep_every_steps
        missing = max(0, count - len(checkpoint_format.list_tags(out / "checkpoints")))
        enough = "" if missing * size <= free else ": NOT ENOUGH for all of them"
        left = f"{format_bytes(free)} are free in {there}{enough}"
        yield f"{format_bytes(size)} a checkpoint, {missing:,} more at most; {left}"

    def _vocab_size(self) -> int:
        """Return the rows of the embeddings; BERT's where the corpus cannot be read."""
        multiple = self.recipe.model.pad_vocab_to_multiple_of
        size = 30_528 if self.corpus is None else self.corpus.tokenizer.vocab_size
        return -(-size // multiple) * multiple

    def memory(self) -> Iterator[str]:
        model, data = self.recipe.model, self.recipe.data
        if self.resolved is None:
            return
        memory = self._memory_of(data.bin_tokens)
        yield (
            f"{num_weights(model, self._vocab_size()) / 1e6:,.0f} M parameters; predicted for each GPU: "
            f"{format_bytes(memory.total)}, of it {format_bytes(memory.states)} for weights, gradients and optimizer"
        )
        fitting = [card for card in CARDS if self._memory_of(data.bin_tokens, card).fits(card.memory)]
        if not fitting:
            yield f"fits no known GPU: halve data.micro_batch_tokens ({data.bin_tokens})"
            return
        least = min(card.memory for card in fitting)
        names = ", ".join(card.name for card in fitting if card.memory == least)
        others = [card.name for card in CARDS if card.memory >= least and card not in fitting]
        without = f", without {', '.join(others)}" if others else ""
        yield f"fits GPUs of {least / 1e9:.0f} GB ({names}) and more{without}"


def _check_sizes(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, as far as its files' names and sizes tell, or None."""
    try:
        return checkpoint_format.check_files(path, hashes=False)
    except (ValueError, OSError) as error:
        return str(error)


def _contents(source: Source) -> str:
    documents = sum(shard.documents for shard in source.shards)
    unit = "tokens" if source.tokenizer_path is None else "characters"
    return f"{len(source.shards):,} shards, {_number(documents)} documents, {_number(source.tokens)} {unit}"


def _range(counts: list[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _number(count: float) -> str:
    """Write 1234567 as 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:,.3g} {letter}"
    return f"{count:,.0f}"
