"""The recipe: dataclasses with every setting of a training run, its unit, its default and its limits.

The ds_config, not the recipe, says how a run is spread over devices. --help prints the docstrings of the settings.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megabert.config.model_section import ModelConfig
from megabert.config.settings import check_limits, check_range, metadata_of, required, setting, with_lists

# Settings for the length of a run: a recipe has exactly one of them.
LENGTHS = ("max_steps", "max_tokens", "max_hours")


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
    """token slots per optimizer step over all ranks; auto: micro_batch_tokens x ranks (for the quickstart)"""
    batch_warmup: float = setting(0.0, "[0, 1)")
    """share of the run in which the batch grows from batch_warmup_from to global_batch_tokens, in equal stages"""
    batch_warmup_from: int | None = setting(None, "[1, 2^40]")
    """token slots of the first steps; must divide global_batch_tokens"""
    max_documents: int | Literal["auto"] = setting("auto", "[1, 2^24]")
    """most pieces in one bin; auto: a third more than the mean, by the lengths of the corpus. A resumed run keeps it"""
    num_workers: int = setting(2, "[0, 256]", may_change=True)
    """loader processes per rank, rounded down to a divisor of streams / ranks; 0: pack in the training process"""
    ranks: list[int] | None = setting(None, may_change=True)
    """numbers of ranks that the run may have, such as [48, 56, 64]; default: what it starts with and divisors of N"""
    on_bad_shard: Literal["stop", "skip"] = setting("stop", may_change=True)
    """what to do with a damaged chunk of a shard: stop the run, or skip the chunk, count it and log it"""
    cache_dir: str = setting("~/.cache/megabert/shards", may_change=True)
    """local folder for shards that cannot be read in parts: from a pipe, or a server without byte ranges"""
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
        assert self.micro_batch_tokens != "auto", "data.micro_batch_tokens auto is not resolved"
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
            assert isinstance(self.max_seq_len, int), "checked at the start"
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


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Masked language modelling: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay."""

    mlm_probability: float = setting(0.3, "(0, 1)", may_branch=True)
    """share of maskable tokens to predict in training"""
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", may_branch=True)
    """how the share changes to final_mlm_probability over the run"""
    final_mlm_probability: float = setting(0.15, "(0, 1)", may_branch=True)
    """share at the end of a linear or cosine schedule"""
    eval_mlm_probability: float = setting(0.15, "(0, 1)")
    """share in evaluation"""

    def __post_init__(self):
        check_limits(self, "masking.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon", "stable_adamw"] = "adamw"
    """muon: Muon for the encoder's matrices, AdamW for the rest; stable_adamw: only at ZeRO stage 0"""
    lr: float = setting(5e-4, "(0, 10]", may_branch=True)
    """peak learning rate"""
    muon_lr: float = setting(0.02, "(0, 10]", may_branch=True)
    """peak learning rate of Muon's matrices"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of Adam's two moments"""
    eps: float = setting(1e-6, "[1e-30, 0.1]")
    """added to Adam's denominator"""
    weight_decay: float = setting(0.01, "[0, 100]")
    """in torch's convention: each step multiplies weights by 1 - lr * weight_decay. Composer's convention, used by
    MosaicBERT's 1e-5, divides lr by the peak: weight_decay here is Composer's value / lr"""
    decay_norms_and_biases: bool = False
    """apply weight decay to biases and LayerNorm weights too"""
    max_grad_norm: float = setting(1.0, "[0, 1e6]")
    """clip the gradient to this norm; 0: no clipping"""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = setting("linear", may_branch=True)
    """schedule after the warm-up: linear or cosine decay, warm-up-stable-decay, or constant"""
    warmup: float = setting(0.06, "[0, 1)", may_branch=True)
    """share of the run in which the learning rate rises linearly, from 1 / warm-up steps of the peak"""
    decay: float = setting(0.1, "(0, 1]", may_branch=True)
    """wsd: share of the run in which the learning rate decays, by 1 - sqrt"""
    final_lr: float = setting(0.02, "[0, 1]", may_branch=True)
    """learning rate at the end of the decay, as a share of the peak"""

    def __post_init__(self):
        check_limits(self, "optimizer.")
        for beta in self.betas:
            check_range("optimizer.betas", beta, "[0, 1)")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"optimizer.warmup {self.warmup} and optimizer.decay {self.decay} together exceed the whole run."
            )
        peak = max(self.lr, self.muon_lr) if self.name == "muon" else self.lr
        if peak * self.weight_decay >= 1:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}, expected less than {1 / peak:g}: a step at the peak "
                f"learning rate {peak} multiplies the weights by 1 - {peak} * {self.weight_decay}."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The length of a run, its output folder, and what it reports."""

    output_dir: str = setting("runs/default", may_change=True)
    """folder for checkpoints, TensorBoard files and run.json"""
    max_steps: int | None = setting(None, "[1, 1e12]", may_branch=True)
    """length of the run, optimizer steps; set one of this, max_tokens and max_hours"""
    max_tokens: int | None = setting(None, "[1, 1e18]", may_branch=True)
    """length of the run, token slots"""
    max_hours: float | None = setting(None, "(0, 1e5]", may_branch=True)
    """length of the run, hours of wall-clock time since the start of the command, summed over all restarts. The
    learning rate follows the clock and has decayed at the end; the last evaluation and checkpoint come after. Also
    --max-hours"""
    seed: int = setting(17, "[0, 2^63)")
    """seed of the weights, the data order, the masks and the dropout"""
    log_every_steps: int = setting(10, "[1, 1e12]", may_change=True)
    """steps between two lines of the log"""
    eval_every_steps: int = setting(2000, "[1, 1e12]", may_change=True)
    """steps between two evaluations; the end of the run has one too"""
    eval_tokens: int = setting(1_048_576, "[1, 1e12]", may_change=True)
    """most token slots of held-out text to evaluate on"""
    save_every_steps: int = setting(3500, "[1, 1e12]", may_change=True)
    """steps between two checkpoints; the end of the run has one too"""
    keep_checkpoints: int = setting(2, "[1, 1e6]", may_change=True)
    """number of latest checkpoints to keep"""
    keep_every_steps: int = setting(0, "[0, 1e12]", may_change=True)
    """also keep every checkpoint whose step is a multiple of this; 0: none"""
    keep_best: bool = setting(False, may_change=True)
    """also keep the checkpoint with the lowest held-out loss; evaluates before every save"""
    async_save: bool = setting(True, may_change=True)
    """write checkpoints in the background, from a copy of the state in host memory"""
    resume: str = setting("auto", may_change=True)
    """auto: resume from the newest checkpoint of output_dir, if there is one; none: start from step 0; or the folder of
    a checkpoint. Also --resume"""
    branch_from: str | None = setting(None, may_change=True)
    """a checkpoint, or another run's folder: where output_dir has no checkpoint, start from that one, with its weights,
    optimizer state, step and place in the data. The length, learning rate and masking of the run may differ"""
    trackers: list[Literal["tensorboard", "csv", "wandb"]] = setting(lambda: ["tensorboard"], may_change=True)
    """where to write curves in addition to metrics.jsonl; wandb must be installed"""
    max_norm_ratio: float = setting(10.0, "[0, 1e6]", may_change=True)
    """skip an update whose gradient norm exceeds this multiple of the median of the last 128; 0: skip only norms that
    are not finite"""
    rollback_after: int = setting(5, "[0, 1e6]", may_change=True)
    """skipped updates in a row after which to return to the last checkpoint and leave out those batches; 0: never"""
    hang_timeout_s: float = setting(60.0, "[0, 86400]", may_change=True)
    """end the run, and name the rank, if one of several ranks makes no progress for so many seconds; before its first
    step, and while PyTorch compiles, five times as many. 0: never"""
    ops: Literal["auto", "torch", "fused"] = setting("auto", may_change=True)
    """kernels. auto: the fastest that run on this device; torch: plain PyTorch; fused: fused kernels, or an error"""
    compile: bool = False
    """apply torch.compile to the whole model; on a GPU, below ZeRO stage 3"""

    def __post_init__(self):
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(
                f"run has {' and '.join(f'{n} {v}' for n, v in given.items())}, expected only one of them."
            )
        check_limits(self, "run.")
        if self.branch_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                f"run.branch_from is {self.branch_from} and run.resume {self.resume}: a run starts from one of them. "
                "Leave one out."
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"run.trackers is {self.trackers}, expected each tracker once.")
        if self.keep_every_steps % self.save_every_steps:
            raise ValueError(
                f"run.keep_every_steps is {self.keep_every_steps}, expected a multiple of run.save_every_steps "
                f"({self.save_every_steps}), or 0."
            )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Fine-tune the run's checkpoints on a small task during training, in a separate process on the CPU."""

    task: str | None = setting(None, may_change=True)
    """a GLUE task, or a task's YAML file, as for launch/finetune_glue.py; null: no probe"""
    data: str = setting("data/glue", may_change=True)
    """folder with the task's data, as for launch/finetune_glue.py"""
    protocol: str = setting("quick", may_change=True)
    """as for launch/finetune_glue.py; the probe uses its first candidate and first seed"""
    every_steps: int = setting(10_000, "[1, 1e12]", may_change=True)
    """optimizer steps between two probes; a multiple of run.save_every_steps, since probes start from checkpoints"""
    max_examples: int = setting(1000, "[1, 1e9]", may_change=True)
    """most examples to train on, and most examples to score"""

    def __post_init__(self):
        check_limits(self, "probe.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that determine the result of a run, together with the corpus and the ds_config's precision."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self):
        run, data, model = self.run, self.data, self.model
        if self.probe.task is not None and self.probe.every_steps % run.save_every_steps:
            raise ValueError(
                f"probe.every_steps is {self.probe.every_steps}, expected a multiple of run.save_every_steps "
                f"({run.save_every_steps}): a probe starts from a checkpoint."
            )
        if all(getattr(run, length) is None for length in LENGTHS):
            raise ValueError(
                "the recipe does not say how long to train: set run.max_steps, run.max_tokens or run.max_hours."
            )
        if run.max_hours and (data.batch_warmup or len(data.lengths) > 1 or self.masking.schedule != "constant"):
            raise ValueError(
                "run.max_hours leaves the number of batches open, so batch size, length and masking cannot change over "
                "the run: set data.batch_warmup 0, one data.max_seq_len and masking.schedule constant; or set "
                "run.max_steps instead."
            )
        if self.masking.schedule != "constant" and any(phase.mlm_probability for phase in data.phases or ()):
            raise ValueError(
                f"data.phases has mlm_probability, and masking.schedule is {self.masking.schedule}: both change the "
                "masking. Leave one of them out."
            )
        if model.position == "learned" and data.longest > model.max_position_embeddings:
            raise ValueError(
                f"data.max_seq_len is {data.longest}, but model.position learned has only "
                f"model.max_position_embeddings = {model.max_position_embeddings} positions. Raise that setting too."
            )

    def with_micro_batch(self, tokens: int) -> "Recipe":
        """Return the recipe with another micro-batch. Raises ValueError if it does not divide the batch."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, micro_batch_tokens=tokens))

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists, ready for YAML or JSON."""
        return with_lists(dataclasses.asdict(self))


def may_change_at_resume(name: str) -> bool:
    """Whether "section.setting" may differ between a run and its continuation; unknown settings may not."""
    return metadata_of(Recipe, name).get("may_change_at_resume", False)


def may_change_at_branch(name: str) -> bool:
    """Whether "section.setting" may differ between a run and a branch of it; unknown settings may not."""
    return metadata_of(Recipe, name).get("may_change_at_branch", False)
