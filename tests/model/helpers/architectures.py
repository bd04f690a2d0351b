"""The architectures that tests run over, and transformers' models with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GteConfig, ModernBertConfig
from transformers.models.modernbert import modeling_modernbert

from megabert.convert.hf.native import to_gte_config, to_modernbert_config
from megabert.convert.weight_names import TIED_DECODER, from_megabert
from megabert.model.configuration_megabert import MegaBertConfig

MODERNBERT = {
    "position": "rope", "rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "norm_position": "pre", "bias": False,
    "norm_bias": False, "global_attention_every": 3, "local_attention_window": 8, "type_vocab_size": 0,
    "layer_norm_eps": 1e-5, "layer_norm_dtype": "float32", "num_hidden_layers": 4, "classifier_dropout": 0.0,
}  # fmt: skip
BERT = {"position": "learned", "ffn": "gelu"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mosaicbert": {},
    "bert": BERT,
    "rope-mosaicbert": {"position": "rope", "rope_theta": 160_000.0},
    "modernbert": MODERNBERT,
    "roberta": BERT | {"position_offset": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "distilbert": BERT | {"type_vocab_size": 0, "classifier_activation": "relu", "attention_output_dropout_prob": 0.0},
    "neighbors": {"embedding_neighbors": 2},
    "electra": BERT | {"classifier_activation": "gelu"},
}


def architectures(*at_every_push: str):
    """Return a mark that runs a test over all architectures: those named at every push, all in the nightly run."""
    names = [*at_every_push, *(pytest.param(name, marks=pytest.mark.nightly) for name in ARCHITECTURES)]
    return pytest.mark.parametrize("architecture", names)


def their_config(config: MegaBertConfig, **changes: Any) -> ModernBertConfig | GteConfig:
    """Return the config of transformers' model."""
    make, cls = (
        (to_modernbert_config, ModernBertConfig) if config.norm_position == "pre" else (to_gte_config, GteConfig)
    )
    return cls(**make(config, {"cls": 1, "sep": 2}) | {"num_labels": config.num_labels} | changes)


def their_model(cls: type, ours: nn.Module, kind: Any, **changes: Any) -> nn.Module:
    """Build transformers' model with the weights of one of our heads."""
    theirs = cls(their_config(ours.config, **changes)).to(next(ours.parameters()).dtype)
    state = dict(ours.state_dict())
    for name in (
        "decoder.bias",
        *(["transform.dense.weight", "transform.norm.weight"] if kind == "modernbert" else []),
    ):
        # Of a head that this model does not have.
        state.setdefault(name, torch.zeros(1))
    heads = {name: state.pop(name) for name in list(state) if name.startswith(("classifier.", "qa_outputs."))}
    renamed = from_megabert(state, kind) | {name.replace("qa_outputs", "classifier"): x for name, x in heads.items()}
    own = theirs.state_dict()
    prefix = "" if any(name.startswith(("model.", "gte.")) for name in own) else ("model.", "gte.")
    renamed = {name.removeprefix("model.").removeprefix("gte.") if prefix else name: x for name, x in renamed.items()}
    theirs.load_state_dict({name: renamed[name] for name in own})
    return theirs


def their_gradients(theirs: nn.Module) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in theirs.named_parameters()}


def our_gradients(ours: nn.Module, kind: Any, names: set[str]) -> dict[str, Any]:
    """Return our gradients by the names of transformers' parameters."""
    grads: dict[str, Any] = {
        name: parameter.grad for name, parameter in ours.named_parameters() if name != TIED_DECODER
    }
    for name in (
        "decoder.bias",
        *(["transform.dense.weight", "transform.norm.weight"] if kind == "modernbert" else []),
    ):
        grads.setdefault(name, torch.zeros(1))
    heads = {name: grads.pop(name) for name in list(grads) if name.startswith(("classifier.", "qa_outputs."))}
    renamed = from_megabert(grads, kind, duplicates=False)
    renamed |= {name.replace("qa_outputs", "classifier"): x for name, x in heads.items()}
    bare = {name.removeprefix("model.").removeprefix("gte."): x for name, x in renamed.items()}
    return {name: (renamed | bare)[name] for name in names}


@pytest.fixture
def exact_rope(monkeypatch):
    """Let transformers' ModernBERT rotate in the dtype of the model: it rounds queries and keys to fp32."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin, half = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), modeling_modernbert.rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", rotate)
