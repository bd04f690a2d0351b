"""Write the targets onnx and onnx-int8: graphs of encoder and masked language model, for any batch size and length."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megabert.convert.check.export_check import build_model
from megabert.convert.hf.heads import MASKED_LM as MASKED_LM_HEAD
from megabert.convert.hf.heads import head_of
from megabert.convert.targets.graph_tokens import encode, find_tokens, spread
from megabert.convert.targets.target import (
    DiffersError,
    Expected,
    ExportedFolder,
    Proof,
    Target,
    batches,
    largest_difference,
    mean_of_tokens,
    smallest_cosine,
)
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.process.error_text import first_line

# optimum, TEI, Infinity and sentence-transformers look for the encoder here.
ENCODER = "onnx/model.onnx"
MASKED_LM = "onnx/model_mlm.onnx"
# optimum uses this name, and transformers.js looks for it with dtype q8.
QUANTIZED = "onnx/model_quantized.onnx"
STATES, LOGITS = "last_hidden_state", "logits"
# The oldest opset that torch's exporter writes without a conversion.
OPSET = 18
# onnxruntime uses other kernels than torch, so its rounding errors differ.
TOLERANCE = 1e-4
INT8_COSINE = 0.99
# What the quantizer logs of every graph: advice, and integers, which it does not quantize.
NO_WARNINGS = ("pre-processing before quantization", "Inference failed or unsupported type to quantize")
# Models narrower than this lose more to 8 bits.
SMALL = 256
USAGE = """import onnxruntime  # with the inputs of AutoTokenizer: input_ids and attention_mask, int64
session = onnxruntime.InferenceSession("this folder/onnx/model.onnx")  # model_mlm.onnx also gives logits
states = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})[0]"""
USE_INT8 = """import onnxruntime
session = onnxruntime.InferenceSession("this folder/onnx/model_quantized.onnx")
states = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})[0]"""


class EncoderGraph(nn.Module):
    def __init__(self, model: MegaBertForMaskedLM):
        super().__init__()
        self.bert = model.bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = find_tokens(input_ids, attention_mask)
        return spread(encode(self.bert, input_ids, found), found)


class MaskedLmGraph(nn.Module):
    """Gives both outputs, because a program that knows one file asks it for either."""

    def __init__(self, model: MegaBertForMaskedLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        found = find_tokens(input_ids, attention_mask)
        hidden = encode(self.model.bert, input_ids, found)
        logits = self.model.decoder(self.model.transform(hidden))
        return spread(logits, found), spread(hidden, found)


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    check_head("onnx", config)
    return []


def check_head(name: str, config: MegaBertConfig) -> None:
    """Raise ValueError for a model with a head for a task, which no graph here computes."""
    if (head := head_of(config)) != MASKED_LM_HEAD:
        raise ValueError(
            f"--for {name}: the model has a head for {head}, and the graphs are of an encoder and of masked language "
            f"modelling only. Leave {name} out."
        )


def write(exported: ExportedFolder, folder: Path) -> str:
    model = build_model(exported.weights, exported.config)
    (folder / ENCODER).parent.mkdir()
    write_graph(EncoderGraph(model), folder / ENCODER, [STATES])
    write_graph(MaskedLmGraph(model), folder / MASKED_LM, [LOGITS, STATES])
    return f"torch {torch.__version__}"


def write_graph(module: nn.Module, path: Path, outputs: list[str]) -> None:
    """Write a graph, and its weights beside it as NAME.data if they are too large for one file.

    Only attention computes the padding; see graph_tokens.py. What a graph gives at padding is 0.
    """
    # The exporter would merge one tensor that is passed twice into one input.
    example = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    # These become the names of the graph's axes.
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with _silent_exporter():
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=["input_ids", "attention_mask"],
            output_names=outputs,
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None, f"{path}: torch's ONNX exporter returned no program"
        program.save(path, external_data=None)


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Hide what the exporter logs and warns about its own future and about torchvision's operations."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prove(folder: Path, expected: Expected) -> Proof:
    """Compare states and logits of the export check's texts, and means of the states of all texts."""
    import onnxruntime

    feed = {name: expected.inputs[name] for name in ("input_ids", "attention_mask")}
    real = feed["attention_mask"].astype(bool)
    with _errors_as_differs():
        encoder, masked_lm = (_open(folder / name) for name in (ENCODER, MASKED_LM))
        (states,) = encoder.run([STATES], feed)
        logits, again = masked_lm.run([LOGITS, STATES], feed)
        pooled = embed(encoder, expected)
    differences = [
        largest_difference(states[real], expected.states, TOLERANCE, f"{ENCODER}: states"),
        largest_difference(logits[real], expected.inputs[LOGITS], TOLERANCE, f"{MASKED_LM}: logits"),
        largest_difference(again[real], expected.states, TOLERANCE, f"{MASKED_LM}: states"),
        largest_difference(pooled, expected.pooled, TOLERANCE, f"{ENCODER}: embeddings"),
    ]
    measure = f"logits, states, and embeddings of {len(expected.texts):,} texts"
    return Proof("onnxruntime", onnxruntime.__version__, max(differences), measure)


def check_int8(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    check_head("onnx-int8", config)
    notes = ["int8 changes the embeddings: it is kept only if every cosine with the model's is at least 0.99"]
    if config.hidden_size < SMALL:
        notes.append(f"a model of width {config.hidden_size} may lose more than that; wider ones rarely do")
    return notes


def write_int8(exported: ExportedFolder, folder: Path) -> str:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_is_worth_reading)
    try:
        # Weights of 7 bits: on a CPU with AVX2 or AVX-512 but without VNNI, sums of products of 8 bits overflow.
        # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
        quantize_dynamic(
            folder / ENCODER, folder / QUANTIZED, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
        )
    finally:
        logging.getLogger().removeFilter(_is_worth_reading)
    return f"onnxruntime {version('onnxruntime')}"


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in NO_WARNINGS)


def prove_int8(folder: Path, expected: Expected) -> Proof:
    import onnxruntime

    with _errors_as_differs():
        pooled = embed(_open(folder / QUANTIZED), expected)
    what = f"embeddings of {len(expected.texts):,} texts"
    cosine = smallest_cosine(pooled, expected.pooled, INT8_COSINE, what)
    note = f"int8 costs agreement: the smallest cosine with the model's embeddings is {cosine:.4f}"
    return Proof("onnxruntime", onnxruntime.__version__, 1 - cosine, f"1 - cosine of {what}", (note,))


def embed(session: Any, expected: Expected, output: str = STATES) -> np.ndarray:
    """Run every text through the graph and average its states: (N, E)."""
    pooled = np.zeros_like(expected.pooled)
    for group, rows, mask in batches(expected.ids, 0):
        (states,) = session.run([output], {"input_ids": rows, "attention_mask": mask})
        pooled[group] = mean_of_tokens(states, mask)
    return pooled


def _open(path: Path) -> Any:
    """Open a graph on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _errors_as_differs() -> Iterator[None]:
    """Raise DiffersError for a graph that onnxruntime cannot open or run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        yield
    except (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NotImplemented,
        errors.RuntimeException,
    ) as error:
        raise DiffersError(f"onnxruntime cannot run a graph: {first_line(error)}") from error


PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TARGET = Target("onnx", check, write, prove, USAGE, packages=PACKAGES, extra="onnx")
INT8 = Target(
    "onnx-int8", check_int8, write_int8, prove_int8, USE_INT8, packages=PACKAGES, extra="onnx", requires=("onnx",)
)
