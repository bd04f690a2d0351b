"""Compare launch/estimate.py's prediction with published pretraining runs.

    python tests/benchmarks/bench_estimate.py [--cpu] [--quick] [--json FILE]

One set of efficiencies for all rows (megabert/training/roofline/work.py), fixed before the comparison. The published
runs used other code on the same work, so a difference is also one between programs; a row that differs by more than
20 % says why. Tokens are those of the source: real ones, or padded slots. It takes no time.
--cpu also trains rows of bench_train.py on this machine's CPU, and predicts them from its best matrix product and a
copy: three rows, with --quick one.
"""

import dataclasses
import statistics
from dataclasses import dataclass

from support import report

from megabert.config.recipe import ModelConfig
from megabert.config.recipe_parser import load_recipe
from megabert.training.micro_batch.batch import Batch
from megabert.training.micro_batch.memory import Execution
from megabert.training.roofline.estimate import predict, predict_recipe
from megabert.training.telemetry.cards import card_named

CLOSE = 0.2
BERT_VOCAB, MODERN_VOCAB = 30_528, 50_368


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run. published: tokens/s per GPU. tokens: of a micro-batch, its real ones; slots: computed. attended:
    mean keys per token. fp8: the source multiplies in FP8. reason: why the prediction may differ by more than CLOSE."""

    name: str
    source: str
    model: ModelConfig
    gpu: str
    gpus: int
    published: float
    tokens: float
    attended: float
    slots: float | None = None
    masking: float = 0.3
    vocab: int = BERT_VOCAB
    fp8: bool = False
    reason: str = ""

    def error(self) -> float:
        """Return (predicted - published) / published."""
        return self.predicted() / self.published - 1

    def predicted(self) -> float:
        """Return the tokens/s per GPU, in the source's kind of tokens."""
        batch = Batch(
            tokens=self.tokens,
            slots=self.slots or self.tokens,
            masked=self.masking * self.tokens,
            attended=self.attended,
        )
        prediction = predict(
            self.model, batch, card_named(self.gpu), Execution(fp8=self.fp8), gpus=self.gpus, accumulation=1,
            zero_stage=0, vocab_size=self.vocab,
        )  # fmt: skip
        return prediction.tokens_per_s


def encoder(layers: int, width: int, inner: int, ffn: str = "geglu", **more: object) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=inner, ffn=ffn,
        **more
    )  # fmt: skip


# Real documents have about 115 of 128 tokens; the sources count slots of 128.
MOSAIC = 128 / 115
MOSAIC_BASE, BERT_LARGE = encoder(12, 768, 3072), encoder(24, 1024, 4096, "gelu")
BERT_BASE = encoder(12, 768, 3072, "gelu", layer_norm_dtype="float32", padding="padded")
MODERN_BASE, MODERN_LARGE = (load_recipe(f"modernbert-{size}").model for size in ("base", "large"))
ETTIN_1B = dataclasses.replace(MODERN_LARGE, hidden_size=1792, num_attention_heads=28, intermediate_size=3840)
# ModernBERT's documents have up to 1,024 tokens: 600 keys per token in global layers.
GLOBAL = 600
# Packed rows of 512 with two documents: 254.2 real tokens per sequence of the source.
MLPERF = {"tokens": 24 * 2 * 254.2, "attended": 340, "masking": 0.15}
# Computed without "casts to FP8" of roofline/work.py.
FP8 = "predicted are separate kernels that cast to FP8, as torchao has them; without their time the difference is"

RUNS = [
    Run(
        name="MosaicBERT-Base, 128", source="arXiv 2312.17482: 70,000 steps of 4,096 x 128 in 5.28 h",
        model=MOSAIC_BASE, gpu="a100", gpus=8, published=241e3 / MOSAIC, tokens=14_720, attended=121,
    ),
    Run(
        name="BERT-Base, 128, padded", source="mosaicml/examples: the same steps in 11.5 h", model=BERT_BASE,
        gpu="a100", gpus=8, published=111e3 / MOSAIC, tokens=14_720, slots=16_384, attended=128, masking=0.15,
        reason="the source runs transformers' BERT operation by operation, and attention without fusion",
    ),
    Run(
        name="ModernBERT-base, 1024", source="arXiv 2412.13663, table 3: 1,529 GPU hours for 1.719 T tokens",
        model=MODERN_BASE, gpu="h100", gpus=8, published=312e3, tokens=98_304, attended=GLOBAL,
        vocab=MODERN_VOCAB,
        reason="not explained: the source gives no times of its operations",
    ),
    Run(
        name="ModernBERT-large, 1024", source="the same: 3,363 GPU hours", model=MODERN_LARGE, gpu="h100",
        gpus=8, published=142e3, tokens=57_344, attended=GLOBAL, vocab=MODERN_VOCAB,
    ),
    Run(
        name="Ettin 150M", source="JHU-CLSP/ettin: 470 h on 4 GPUs for 2 T tokens", model=MODERN_BASE,
        gpu="h100", gpus=4, published=296e3, tokens=98_304, attended=GLOBAL, vocab=MODERN_VOCAB,
        reason="as ModernBERT-base, whose code it is",
    ),
    Run(
        name="Ettin 400M", source="the same: 950 h", model=MODERN_LARGE, gpu="h100", gpus=4,
        published=146e3, tokens=57_344, attended=GLOBAL, vocab=MODERN_VOCAB,
    ),
    Run(
        name="Ettin 1B", source="the same: 2,170 h", model=ETTIN_1B, gpu="h100", gpus=4,
        published=64e3, tokens=32_768, attended=GLOBAL, vocab=MODERN_VOCAB,
    ),
    Run(
        name="MLPerf BERT-Large, packed 512", source="MLPerf v2.1, NVIDIA: 2,370 sequences/s", model=BERT_LARGE,
        gpu="a100", gpus=8, published=2370 / 8 * 254.2, **MLPERF,
    ),
    Run(
        name="MLPerf BERT-Large, packed 512", source="MLPerf v3.1, NVIDIA: 7,760 sequences/s", model=BERT_LARGE,
        gpu="h100", gpus=8, published=7760 / 8 * 254.2, fp8=True, reason=f"{FP8} -15 %", **MLPERF,
    ),
    Run(
        name="MLPerf BERT-Large, packed 512", source="MLPerf v4.0, NVIDIA: 7,972 sequences/s", model=BERT_LARGE,
        gpu="h200", gpus=8, published=7972 / 8 * 254.2, fp8=True, reason=f"{FP8} -7 %", **MLPERF,
    ),
    Run(
        name="MLPerf BERT-Large, packed 512", source="MLPerf v5.0, NVIDIA: 11,663 sequences/s", model=BERT_LARGE,
        gpu="b200", gpus=8, published=11_663 / 8 * 254.2, fp8=True, reason=f"{FP8} -9 %", **MLPERF,
    ),
]  # fmt: skip


# The settings whose effect the formula knows, each against mosaicbert-base as it is, at ZeRO 1: overrides and stage.
LEVERS = {
    "run.cuda_graphs auto": ({"run.cuda_graphs": "auto"}, 1),
    "run.fp8 torchao, run.compile": ({"run.fp8": "torchao", "run.compile": True}, 1),
    "data.micro_batch_tokens 14720": ({"data.micro_batch_tokens": 14_720}, 1),
    "model.layer_norm_dtype float32": ({"model.layer_norm_dtype": "float32"}, 1),
    "ZeRO 0": ({}, 0),
    "ZeRO 2": ({}, 2),
}


def speed(gpu: str, overrides: dict[str, object], stage: int) -> float:
    """Return the predicted tokens/s per GPU of mosaicbert-base on 8 of them."""
    recipe = load_recipe("mosaicbert-base", **overrides)
    return predict_recipe(recipe, card_named(gpu), 8, stage).tokens_per_s


def print_levers() -> None:
    """Print the likely speed, a floor, and what each setting changes.

    The floor is as far below as the worst of the published runs of fused programs is below its prediction.
    """
    worst = max(run.error() for run in RUNS if run.model.padding != "padded")
    gpus = ("a100", "h100")
    likely = {gpu: speed(gpu, {}, 1) for gpu in gpus}
    print("\n| mosaicbert-base, tokens/s per GPU | 8 x a100 | 8 x h100 |\n|---|---|---|")
    print(f"| likely | {' | '.join(f'{likely[gpu] / 1e3:.0f}k' for gpu in gpus)} |")
    print(f"| floor | {' | '.join(f'{likely[gpu] / (1 + worst) / 1e3:.0f}k' for gpu in gpus)} |")
    for name, (overrides, stage) in LEVERS.items():
        of = [gpu for gpu in gpus if "fp8" not in name or card_named(gpu).fp8]
        gains = [f"{speed(gpu, overrides, stage) / likely[gpu] - 1:+.1%}" if gpu in of else "none" for gpu in gpus]
        print(f"| {name} | {' | '.join(gains)} |")


def main() -> None:
    parser = report.make_parser(__doc__ or "", quick="one row of --cpu")
    parser.add_argument("--cpu", action="store_true", help="also compare with the speed of this machine's CPU")
    arguments = parser.parse_args()
    print("| run | GPUs | published | predicted | difference | why more than 20 % |\n|---|---|---|---|---|---|")
    for run in RUNS:
        far = abs(run.error()) > CLOSE
        print(
            f"| {run.name} | {run.gpus} x {run.gpu} | {run.published / 1e3:.0f}k | {run.predicted() / 1e3:.0f}k | "
            f"{run.error():+.0%} | {run.reason if far else ''} |"
        )
    errors = [abs(run.error()) for run in RUNS]
    figures = {"estimate_error_max": max(errors), "estimate_error_median": statistics.median(errors)}
    print(f"\nlargest difference {figures['estimate_error_max']:.0%}, median {figures['estimate_error_median']:.0%}")
    print_levers()
    if arguments.cpu:
        # Imported here because it loads transformers and the compiler.
        from support.this_cpu import compare

        figures |= compare(arguments.quick)
    report.write(figures, arguments.json)


if __name__ == "__main__":
    main()
