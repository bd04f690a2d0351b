"""An independent MosaicBERT, written from the paper's equations, for one document at a time.

It uses nothing of megabert but the names of the state dict. Shapes are (S, E) for one document.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def slopes(num_heads: int) -> list[float]:
    """Return ALiBi's slopes (https://arxiv.org/abs/2108.12409, section 3), for any number of heads as in its code."""
    if math.log2(num_heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(num_heads) - 3)))
        return [start * start**i for i in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return slopes(below) + slopes(2 * below)[0::2][: num_heads - below]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def logits(
    weights: dict[str, Tensor],
    ids: Tensor,
    num_layers: int,
    num_heads: int,
    eps: float = 1e-12,
    drop: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return (S, V) for one document. drop: called wherever the model has dropout, in order."""
    w = weights
    x = w["bert.embeddings.word_embeddings.weight"][ids] + w["bert.embeddings.token_type_embeddings.weight"][0]
    x = norm(x, w["bert.embeddings.norm.weight"], w["bert.embeddings.norm.bias"], eps)
    x = drop(x)
    length, width = x.shape
    size = width // num_heads
    for layer in range(num_layers):
        p = f"bert.encoder.layers.{layer}."
        qkv = x @ w[p + "attention.qkv.weight"].T + w[p + "attention.qkv.bias"]
        query, key, value = qkv.split(width, dim=-1)
        mixed = torch.zeros_like(x)
        for head, slope in enumerate(slopes(num_heads)):
            part = slice(head * size, (head + 1) * size)
            for i in range(length):
                scores = torch.stack(
                    [query[i, part] @ key[j, part] / math.sqrt(size) - slope * abs(i - j) for j in range(length)]
                )
                shares = torch.exp(scores - scores.max())
                mixed[i, part] = (shares / shares.sum()) @ value[:, part]
        attended = mixed @ w[p + "attention.out.weight"].T + w[p + "attention.out.bias"]
        x = norm(drop(attended) + x, w[p + "attention_norm.weight"], w[p + "attention_norm.bias"], eps)
        gate, up = (x @ w[p + "mlp.up.weight"].T).chunk(2, dim=-1)
        down = drop(gelu(gate) * up) @ w[p + "mlp.down.weight"].T + w[p + "mlp.down.bias"]
        x = norm(down + x, w[p + "mlp_norm.weight"], w[p + "mlp_norm.bias"], eps)
    x = gelu(x @ w["transform.dense.weight"].T + w["transform.dense.bias"])
    x = norm(x, w["transform.norm.weight"], w["transform.norm.bias"], eps)
    return x @ w["bert.embeddings.word_embeddings.weight"].T + w["decoder.bias"]
