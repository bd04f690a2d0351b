"""The recipe: what is trained, on what, how long. The ds_config says how it is spread over devices.

A setting has one owner; what can be derived is a property. Units are in the docstrings, which --help prints.
recipe.py reads one from YAML and flags.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

LENGTHS = ("max_steps", "max_tokens", "max_hours")  # of a run, one of them
ENDLESS = 1 << 40  # steps, more than any run has
CHECKPOINTING = re.compile(r"none|every_layer|every_(\d+)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder."""

    num_hidden_layers: int = 12
    """layers"""
    hidden_size: int = 768
    """width of the residual stream, features"""
    num_attention_heads: int = 12
    """attention heads per layer"""
    intermediate_size: int = 3072
    """MLP width, features (with geglu: of each half)"""
    position: Literal["alibi", "learned"] = "alibi"
    """alibi: a bias of -slope * distance; learned: position embeddings"""
    ffn: Literal["geglu", "gelu"] = "geglu"
    """the MLP: gated, or BERT's plain one"""
    layer_norm_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """precision of LayerNorm and the residual stream where the ds_config computes in bf16"""
    layer_norm_eps: float = 1e-12
    """added to the variance in LayerNorm"""
    hidden_dropout: float = 0.1
    """dropout on embeddings, on each block's outputs, and inside the GLU; probability"""
    attention_dropout: float = 0.0
    """dropout on attention weights; probability"""
    padding: Literal["unpadded", "padded"] = "unpadded"
    """padded really computes the padding: the baseline's way, for comparison"""
    max_position_embeddings: int = 512
    """rows of the position table, tokens; only position: learned has one"""
    pad_vocab_to_multiple_of: int = 64
    """embedding rows are the tokenizer's vocabulary rounded up to a multiple of this"""
    initializer_range: float = 0.02
    """standard deviation of the initial weights"""
    z_loss: float = 0.0
    """adds this times log(sum of exp of logits)^2 to each masked token's training loss, which keeps logits small; 1e-4 is usual"""
    init_from: str | None = None
    """begin with the weights of this folder, which launch/convert_from_hf.py wrote; a resumed run has its own"""
    gradient_checkpointing: str = "none"
    """recompute activations in the backward pass: none, every_layer or every_K (every K-th layer)"""

    def __post_init__(self):
        if not CHECKPOINTING.fullmatch(self.gradient_checkpointing) or self.checkpoint_every < 0:
            raise ValueError(
                f"model.gradient_checkpointing is {self.gradient_checkpointing!r}, "
                "expected none, every_layer or every_K with K >= 1, such as every_2."
            )
        positive = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        for name in (*positive, "max_position_embeddings", "pad_vocab_to_multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, expected at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size is {self.hidden_size}, expected a multiple of "
                f"model.num_attention_heads ({self.num_attention_heads})."
            )
        for name in ("hidden_dropout", "attention_dropout"):
            _check_range(f"model.{name}", getattr(self, name), 0, 1, closed_below=True)

    @property
    def checkpoint_every(self) -> int:
        """0 for none, 1 for every layer, K for every K-th."""
        if self.gradient_checkpointing == "none":
            return 0
        number = self.gradient_checkpointing.removeprefix("every_")
        return 1 if number == "layer" else int(number) or -1


@dataclass(frozen=True, kw_only=True)
class CorpusPart:
    """One of several corpora that a run mixes."""

    shards: str
    """as data.train"""
    weight: float = 1.0
    """its part of the tokens, relative to the others' weights"""

    def __post_init__(self):
        _check_range("weight of a data.train", self.weight, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class LengthPhase:
    """A part of a run with one length."""

    max_seq_len: int
    """longest piece of a document, tokens"""
    until: float
    """share of the run's steps at which this phase ends"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The shards, and how they become packed batches."""

    train: list[CorpusPart] | str = "data/quickstart/tokens"
    """shards: a folder with a manifest.json, or its tar files in brace notation; local, a URL, or pipe:COMMAND. Or several
    to mix, as a list of {shards, weight}"""
    heldout: str | None = None
    """shards to evaluate on; by default the held-out split beside data.train"""
    tokenizer: str | None = None
    """tokenizer.json or a folder with one: shards of text are tokenized with it as they are read"""
    max_seq_len: list[LengthPhase] | int = 128
    """longest piece of a document, tokens, [CLS] and [SEP] included. Or a list of {max_seq_len, until}, the last until 1"""
    documents: Literal["split", "truncate"] = "split"
    """longer documents: split evenly into pieces, or truncate to the first piece"""
    micro_batch_tokens: int = 65_536
    """tokens per bin: what one rank computes at once"""
    global_batch_tokens: int | Literal["auto"] = 524_288
    """token slots per optimizer step over all ranks; auto: micro_batch_tokens x ranks (quickstart only)"""
    batch_warmup: float = 0.0
    """share of the run in which a step grows from batch_warmup_from to global_batch_tokens, in equal stages"""
    batch_warmup_from: int | None = None
    """token slots of the first steps; divides global_batch_tokens"""
    max_documents: int | Literal["auto"] = "auto"
    """most pieces in one bin; auto: 4 x micro_batch_tokens / median piece length"""
    num_workers: int = 2
    """loader processes per rank, rounded down to a divisor of streams / ranks; 0: pack in the training process"""
    max_streams: int = 192
    """most streams that the shards are dealt to; their number is fixed for the whole run"""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """what a damaged chunk of a shard does: stop the run, or be left out, counted and logged"""
    cache_dir: str = "~/.cache/megabert/shards"
    """local folder for shards that come whole, from a pipe or a server without byte ranges"""
    cache_gb: int = 64
    """most of them to keep there, GiB; give it room for a shard per stream of this machine's ranks"""

    def __post_init__(self):
        untils = [until for _, until in self.lengths]
        if not self.lengths or untils != sorted({*untils}) or untils[0] <= 0 or untils[-1] != 1:
            raise ValueError(f"data.max_seq_len has phases until {untils}, expected rising shares, the last of them 1.")
        if min(length for length, _ in self.lengths) < 3:
            raise ValueError(f"data.max_seq_len is {self.max_seq_len}, expected at least 3: [CLS], one token, [SEP].")
        if self.micro_batch_tokens < self.longest:
            raise ValueError(
                f"data.micro_batch_tokens is {self.micro_batch_tokens}, expected at least data.max_seq_len ({self.longest})."
            )
        if isinstance(self.train, str) and self.train.startswith("["):
            raise ValueError(
                f"data.train is {self.train}, expected a path, or a list of {{shards: PATH, weight: NUMBER}}."
            )
        _check_range("data.batch_warmup", self.batch_warmup, 0, 1, closed_below=True)
        if (self.batch_warmup_from is None) != (self.batch_warmup == 0):
            raise ValueError(
                f"data.batch_warmup is {self.batch_warmup} and data.batch_warmup_from {self.batch_warmup_from}, expected both "
                "or neither."
            )
        first, full = self.batch_warmup_from, self.global_batch_tokens
        if first is not None and (full == "auto" or first < 1 or first % self.micro_batch_tokens or full % first):
            raise ValueError(
                f"data.batch_warmup_from is {first}, expected a multiple of data.micro_batch_tokens ({self.micro_batch_tokens}) "
                f"that divides data.global_batch_tokens ({full})."
            )
        if not self.corpora:
            raise ValueError("data.train is an empty list, expected at least one corpus.")
        if self.cache_gb < 1:
            raise ValueError(f"data.cache_gb is {self.cache_gb}, expected at least 1.")
        if self.global_batch_tokens != "auto" and (
            self.global_batch_tokens < 1 or self.global_batch_tokens % self.micro_batch_tokens
        ):
            raise ValueError(
                f"data.global_batch_tokens is {self.global_batch_tokens}, expected a multiple of "
                f"data.micro_batch_tokens ({self.micro_batch_tokens})."
            )
        if self.num_workers < 0 or self.max_streams < 1:
            raise ValueError(
                f"data.num_workers is {self.num_workers} and data.max_streams {self.max_streams}, "
                "expected at least 0 and 1."
            )

    @property
    def corpora(self) -> list[tuple[str, float]]:
        """(location, weight) of each corpus."""
        if isinstance(self.train, str):
            return [(self.train, 1.0)]
        return [(part.shards, part.weight) for part in self.train]

    @property
    def lengths(self) -> list[tuple[int, float]]:
        """(max_seq_len, share of the run at which it ends) of each phase."""
        if isinstance(self.max_seq_len, int):
            return [(self.max_seq_len, 1.0)]
        return [(phase.max_seq_len, phase.until) for phase in self.max_seq_len]

    @property
    def longest(self) -> int:
        """Longest piece of any phase, tokens."""
        return max(length for length, _ in self.lengths)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Masked language modelling: 80 % of the chosen tokens become [MASK], 10 % a random one, 10 % stay."""

    mlm_probability: float = 0.3
    """share of maskable tokens to predict in training"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how that share goes to final_mlm_probability over the run"""
    final_mlm_probability: float = 0.15
    """the share at the end of a linear or cosine schedule"""
    eval_mlm_probability: float = 0.15
    """the same in evaluation"""

    def __post_init__(self):
        _check_range("masking.mlm_probability", self.mlm_probability, 0, 1)
        _check_range("masking.final_mlm_probability", self.final_mlm_probability, 0, 1)
        _check_range("masking.eval_mlm_probability", self.eval_mlm_probability, 0, 1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon", "lamb", "stable_adamw"] = "adamw"
    """muon: for the encoder's matrices, AdamW for the rest; lamb and stable_adamw: at ZeRO stage 0 only"""
    lr: float = 5e-4
    """peak learning rate"""
    muon_lr: float = 0.02
    """the same for what Muon steps"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of Adam's two moments"""
    eps: float = 1e-6
    """added to Adam's denominator"""
    weight_decay: float = 0.01
    """torch's convention: each step multiplies weights by 1 - lr * weight_decay. Composer's, which MosaicBERT's 1e-5 is in,
    divides lr by its peak: weight_decay here is that / lr"""
    decay_norms_and_biases: bool = False
    """whether biases and LayerNorm weights decay too"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm; 0: never"""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """what follows the warm-up: a linear or cosine decay, warm-up-stable-decay, or nothing"""
    warmup: float = 0.06
    """share of the run that warms up linearly from 0"""
    decay: float = 0.1
    """share of the run in which wsd decays, by 1 - sqrt"""
    final_lr: float = 0.02
    """learning rate at the end of the decay, as a share of the peak"""

    def __post_init__(self):
        _check_range("optimizer.warmup", self.warmup, 0, 1, closed_below=True)
        _check_range("optimizer.final_lr", self.final_lr, 0, 1, closed_below=True, closed_above=True)
        _check_range("optimizer.decay", self.decay, 0, 1, closed_above=True)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"optimizer.warmup {self.warmup} and optimizer.decay {self.decay} are more than the whole run together."
            )
        for name in ("lr", "muon_lr"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"optimizer.{name} is {value}, expected more than 0.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where to, and what to report."""

    output_dir: str = "runs/default"
    """folder for checkpoints, TensorBoard and run.json"""
    max_steps: int | None = None
    """length of the run, optimizer steps; give this, max_tokens or max_hours"""
    max_tokens: int | None = None
    """length of the run, token slots"""
    max_hours: float | None = None
    """length of the run, hours of wall-clock time from the start of the command, over all restarts; the learning rate follows
    the clock and has decayed when they are over. The last evaluation and checkpoint come after. Also --max-hours"""
    seed: int = 17
    """seed of the weights, the data order, the masks and the dropout"""
    log_every_steps: int = 10
    """steps between two lines of the log"""
    eval_every_steps: int = 2000
    """steps between two evaluations; one more comes at the end"""
    eval_tokens: int = 1_048_576
    """token slots of held-out text to evaluate on, at most"""
    save_every_steps: int = 3500
    """steps between two checkpoints; one more comes at the end"""
    keep_checkpoints: int = 2
    """checkpoints to keep, the latest ones"""
    keep_every_steps: int = 0
    """and every checkpoint of a multiple of so many steps; 0: none"""
    keep_best: bool = False
    """and the one of the lowest held-out loss, which is then measured before every save"""
    async_save: bool = True
    """write checkpoints while training goes on, from a copy of the state in host memory"""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of output_dir, if any; none: start anew; or a checkpoint's folder. Also --resume"""
    trackers: list[Literal["tensorboard", "csv", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """where curves go beside metrics.jsonl; wandb wants to be installed"""
    max_norm_ratio: float = 10.0
    """skip an update whose gradient norm is this many times the median of the last 128; 0: only if it is not finite"""
    rollback_after: int = 5
    """skipped updates in a row after which to go back to the last checkpoint and on past those batches; 0: never"""
    ops: Literal["auto", "torch", "fused"] = "auto"
    """kernels: the fastest that work here, plain PyTorch, or the fused ones or nothing"""
    compile: bool = False
    """torch.compile the whole model around its kernels; on a GPU, below ZeRO 3"""

    def __post_init__(self):
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(
                f"run has {' and '.join(f'{n} {v}' for n, v in given.items())}, expected only one of them."
            )
        if self.max_hours is not None and not 0 < self.max_hours < math.inf:
            raise ValueError(f"run.max_hours is {self.max_hours}, expected more than 0.")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"run.seed is {self.seed}, expected a number from 0 to 2^63 - 1.")
        if self.keep_every_steps < 0 or self.keep_every_steps % self.save_every_steps:
            raise ValueError(
                f"run.keep_every_steps is {self.keep_every_steps}, expected a multiple of run.save_every_steps "
                f"({self.save_every_steps}), or 0."
            )
        if self.max_norm_ratio < 0 or self.rollback_after < 0:
            raise ValueError(
                f"run.max_norm_ratio is {self.max_norm_ratio} and run.rollback_after {self.rollback_after}, expected 0 or more."
            )
        positive = ("log_every_steps", "eval_every_steps", "save_every_steps", "keep_checkpoints", "eval_tokens")
        for name in ("max_steps", "max_tokens", *positive):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"run.{name} is {value}, expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Fine-tuning the run's own checkpoints on a small task, on the CPU beside the training, to see what they are worth."""

    task: str | None = None
    """one of GLUE's tasks, or a YAML file as of launch/finetune_glue.py; null: no probe"""
    data: str = "data/glue"
    """folder with the task's data, as of launch/finetune_glue.py"""
    protocol: str = "quick"
    """as of launch/finetune_glue.py; its first candidate and first seed"""
    every_steps: int = 10_000
    """optimizer steps between two probes, a multiple of run.save_every_steps: they start from checkpoints"""
    max_examples: int = 1000
    """examples to train on, and to score"""

    def __post_init__(self):
        if min(self.every_steps, self.max_examples) < 1:
            raise ValueError(
                f"probe.every_steps is {self.every_steps} and probe.max_examples {self.max_examples}, expected at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run's result depends on, beside the corpus and the ds_config's precision."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self):
        if self.probe.task is not None and self.probe.every_steps % self.run.save_every_steps:
            raise ValueError(
                f"probe.every_steps is {self.probe.every_steps}, expected a multiple of run.save_every_steps "
                f"({self.run.save_every_steps}): a probe starts from a checkpoint."
            )
        if all(getattr(self.run, length) is None for length in LENGTHS):
            raise ValueError(
                "the recipe does not say how long to train: set run.max_steps, run.max_tokens or run.max_hours."
            )
        data = self.data
        if self.run.max_hours and (data.batch_warmup or len(data.lengths) > 1 or self.masking.schedule != "constant"):
            raise ValueError(
                "with run.max_hours nobody knows how many batches there will be, so their size, length and masking cannot "
                "change over the run: set data.batch_warmup 0, one data.max_seq_len and masking.schedule constant; or "
                "run.max_steps instead."
            )
        if self.model.position == "learned" and self.data.longest > self.model.max_position_embeddings:
            raise ValueError(
                f"data.max_seq_len is {self.data.longest}, but model.position learned has only "
                f"model.max_position_embeddings = {self.model.max_position_embeddings} positions. Raise that one too."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for YAML or JSON."""
        return _plain(dataclasses.asdict(self))


def batches_per_step(recipe: Recipe, world_size: int) -> int:
    """Give G, the micro-batches of one optimizer step over all ranks. Raises ValueError if the ranks can't share them."""
    data = recipe.data
    if data.global_batch_tokens == "auto":
        return world_size
    total = data.global_batch_tokens // data.micro_batch_tokens
    if total % world_size:
        raise ValueError(
            f"data.global_batch_tokens {data.global_batch_tokens} is {total} micro-batches of {data.micro_batch_tokens} "
            f"tokens, which {world_size} ranks cannot share evenly. Choose a data.micro_batch_tokens that leaves each rank "
            f"as many, another number of ranks, or a global_batch_tokens that is a multiple of {world_size} x "
            f"{data.micro_batch_tokens} = {world_size * data.micro_batch_tokens}."
        )
    return total


def total_steps(recipe: Recipe, step_batches: int) -> int:
    """Give the optimizer steps of the whole run, at least 1; ENDLESS where it is the clock that ends it."""
    if recipe.run.max_steps is not None:
        return recipe.run.max_steps
    if recipe.run.max_tokens is None:
        return ENDLESS
    return max(1, recipe.run.max_tokens // (step_batches * recipe.data.micro_batch_tokens))


def _check_range(
    name: str, value: float, low: float, high: float, *, closed_below: bool = False, closed_above: bool = False
) -> None:
    above = value >= low if closed_below else value > low
    below = value <= high if closed_above else value < high
    if not (above and below):
        interval = f"{'[' if closed_below else '('}{low}, {high}{']' if closed_above else ')'}"
        raise ValueError(f"{name} is {value}, expected a number in {interval}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
