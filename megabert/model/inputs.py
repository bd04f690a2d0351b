"""Read the arguments of a forward pass: refuse what is missing, contradictory or of another shape, and drop padding."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .padding import Sequences, Tokens, positions_within, unpad, unpad_in_place

# Arguments of transformers' BERT that this model does not have, and why. All others that it does not know are ignored,
# as in transformers.
UNSUPPORTED = {
    "output_attentions": "there are none to return, since no implementation computes a whole attention matrix",
    "head_mask": "heads cannot be masked; attention is one operation over all of them",
    "encoder_hidden_states": "this is an encoder without cross-attention",
    # The names of transformers' flash-attention arguments. A packed call without them would be one long document.
    "cu_seq_lens_q": "pass packed tokens as (tokens,) with cu_seqlens",
    "cu_seq_lens_k": "pass packed tokens as (tokens,) with cu_seqlens",
    # The document of each token, from transformers' DataCollatorWithFlattening.
    "seq_idx": "pass packed tokens as (tokens,) with cu_seqlens",
    # Heads that have it name it.
    "cu_seqlens": "this head reads rows with an attention_mask, no packed tokens",
}


def refuse_unsupported(arguments: Mapping[str, object]) -> None:
    """Raise ValueError for an argument in UNSUPPORTED that is set."""
    for name, reason in UNSUPPORTED.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: {reason}.")


class Inputs(NamedTuple):
    """The arguments of a forward pass that describe its tokens, as the caller gave them.

    Padded: attention_mask, token_type_ids and position_ids are (B, S), as is input_ids; inputs_embeds replaces it and
    is (B, S, E); position_ids may be (1, S), for every row. Packed, with cu_seqlens: (T,) and (T, E), without an
    attention_mask.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def check_shape(name: str, values: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError naming both shapes unless they are equal."""
    if tuple(values.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {tuple(expected)}: {meaning}.")


def flatten_choices(inputs: Inputs) -> tuple[int, Inputs]:
    """Return the number of choices C, and (B, C, S) inputs as (B * C, S). Raises ValueError for other shapes."""
    given = inputs.input_ids if inputs.input_ids is not None else inputs.inputs_embeds
    if given is None:
        # read_tokens() raises the error for missing inputs.
        return 1, inputs
    lead = 3 if inputs.input_ids is not None else 4
    if given.dim() != lead:
        name = "input_ids" if inputs.input_ids is not None else "inputs_embeds"
        shape = "(batch, choices, length)" if lead == 3 else "(batch, choices, length, width)"
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {shape}.")
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        if (values := getattr(inputs, name)) is not None:
            check_shape(name, values, tuple(given.shape[:3]), "a number per token of each choice")
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    tensors = {name: values.flatten(0, 1) for name in names if (values := getattr(inputs, name)) is not None}
    return given.shape[1], Inputs(**tensors)


def in_one_graph() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace is recording this forward pass as a graph."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def read_tokens(
    inputs: Inputs,
    hidden_size: int,
    static: bool = False,
    longest: int | None = None,
    padding_id: int | None = None,
) -> Tokens:
    """Convert a packed or a padded call to (T,) tokens.

    static: compute the padding too, in shapes that do not depend on the mask. longest: the number of positions, or
    None. padding_id: the token that positions do not count, or None if they count slots, see count_tokens(). Raises
    ValueError for a missing or a contradictory argument, for one whose shape is not that of the ids, and for tokens
    without a position.
    """
    ids, embeds = inputs.input_ids, inputs.inputs_embeds
    if ids is None and embeds is None:
        raise ValueError("input_ids is missing: pass input_ids or inputs_embeds.")
    if ids is not None and embeds is not None:
        raise ValueError("input_ids and inputs_embeds were both passed, expected one of them.")
    first = ids if ids is not None else embeds
    assert first is not None, "neither input_ids nor inputs_embeds was passed"
    num_dims = 1 if inputs.cu_seqlens is not None else 2
    if first.dim() != num_dims + (ids is None):
        name, width = ("input_ids", "") if ids is not None else ("inputs_embeds", ", width")
        expected = f"(batch, length{width}), or ({'tokens' + width if width else 'tokens,'}) with cu_seqlens"
        raise ValueError(f"{name} has shape {tuple(first.shape)}, expected {expected}.")
    shape = tuple(first.shape[:num_dims])
    if embeds is not None:
        check_shape("inputs_embeds", embeds, (*shape, hidden_size), "its width is the model's hidden_size")
    same = "the shape of input_ids" if ids is not None else "that of inputs_embeds without its last dimension"
    if inputs.position_ids is not None and num_dims == 2 and tuple(inputs.position_ids.shape) == (1, shape[1]):
        inputs = inputs._replace(position_ids=inputs.position_ids.expand(shape))
    for name in ("token_type_ids", "position_ids"):
        if (values := getattr(inputs, name)) is not None:
            check_shape(name, values, shape, same)
    if inputs.max_seqlen is not None and inputs.cu_seqlens is None:
        raise ValueError("max_seqlen was passed without cu_seqlens, which says where documents begin and end.")
    if inputs.cu_seqlens is not None:
        return _read_packed(inputs, inputs.cu_seqlens, shape[0], padding_id)
    if inputs.attention_mask is not None:
        meaning = f"{same}; it is not 0 at real tokens, and masks for each query or head are not supported"
        check_shape("attention_mask", inputs.attention_mask, shape, meaning)
        _refuse_added_mask(inputs.attention_mask)
    elif inputs.position_ids is not None:
        _refuse_packed_positions(inputs.position_ids)
    if inputs.position_ids is None:
        position_ids = number_slots(first, shape) if ids is None else count_tokens(ids, padding_id)
        if longest is not None and shape[1] > longest:
            _check_learned(position_ids, inputs.attention_mask, longest)
        inputs = inputs._replace(position_ids=position_ids)
    return _read_padded(inputs, first, shape, static)


def _check_learned(position_ids: Tensor, attention_mask: Tensor | None, longest: int) -> None:
    """Raise ValueError if a real token of (B, S) has a position from `longest` on, which the model has not learned."""
    beyond = position_ids >= longest
    if attention_mask is not None:
        beyond = beyond & (attention_mask != 0)
    if beyond.any():
        raise ValueError(
            f"a text has {position_ids.shape[1]} tokens, but the model has learned the positions of {longest}: "
            "truncate it."
        )


def _refuse_added_mask(mask: Tensor) -> None:
    """Raise ValueError for a mask whose padding is negative: "not 0" would mean the opposite."""
    # Reading values of a tensor on a GPU waits for it, and tokenizers give integers.
    if mask.is_floating_point() and not in_one_graph() and bool((mask < 0).any()):
        raise ValueError(
            "attention_mask has negative numbers, as if it were added to scores; expected 1 at real tokens and 0 at "
            "padding."
        )


def _refuse_packed_positions(position_ids: Tensor) -> None:
    """Raise ValueError for (B, S) positions of several documents in a row, all of whose tokens would see each other.

    transformers' DataCollatorWithFlattening gives such positions, and no mask.
    """
    if in_one_graph():
        return
    step, begins = position_ids.diff(dim=1), position_ids[:, 1:] == position_ids[:, :1]
    if bool((begins & (step != 0)).any()) and bool((begins | (step == 1)).all()):
        raise ValueError(
            "position_ids begin anew within a row, as in packed documents, but the tokens of a row attend to each "
            "other. Pass packed tokens as (tokens,) with cu_seqlens, or an attention_mask of ones if they shall."
        )


def number_slots(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return 0, 1, 2, ... for each row of (B, S)."""
    # BERT counts slots, not tokens: the first token of a row that is padded on the left has a later position.
    return torch.arange(shape[1], device=values.device).expand(shape)


def count_tokens(input_ids: Tensor, padding_id: int | None) -> Tensor:
    """Return the positions of (B, S) tokens: those of their slots or, with padding_id, as RoBERTa counts.

    It counts from 0 the tokens of a row that are not padding_id, which has position -1, wherever it is.
    """
    if padding_id is None:
        return number_slots(input_ids, tuple(input_ids.shape))
    real = input_ids != padding_id
    return real.long().cumsum(1) * real - 1


def _count_packed(input_ids: Tensor, cu_seqlens: Tensor, padding_id: int) -> Tensor:
    """Do what count_tokens() does, for packed documents (T,)."""
    real = input_ids != padding_id
    counted = torch.nn.functional.pad(real.long().cumsum(0), (1, 0))
    token = torch.arange(len(input_ids), device=input_ids.device)
    begin = token - positions_within(cu_seqlens, len(input_ids))
    return (counted[1:] - counted[begin]) * real - 1


def _read_packed(inputs: Inputs, cu_seqlens: Tensor, num_tokens: int, padding_id: int | None) -> Tokens:
    max_seqlen = inputs.max_seqlen
    if inputs.attention_mask is not None:
        raise ValueError("attention_mask was passed with cu_seqlens, which alone says where documents begin and end.")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (documents + 1,).")
    # Reading values of a tensor on a GPU would wait for the GPU.
    if cu_seqlens.is_cpu or max_seqlen is None:
        lengths = cu_seqlens.diff().tolist()
        longest = max(lengths, default=0)
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens goes from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}, expected numbers that never "
                f"decrease from 0 to {num_tokens}, the number of tokens."
            )
        max_seqlen = longest if max_seqlen is None else max_seqlen
        if max_seqlen < longest:
            raise ValueError(f"max_seqlen is {max_seqlen}, but a document has {longest} tokens.")
    position_ids = inputs.position_ids
    if position_ids is None and padding_id is not None and inputs.input_ids is not None:
        position_ids = _count_packed(inputs.input_ids, cu_seqlens, padding_id)
    elif position_ids is None:
        position_ids = positions_within(cu_seqlens, num_tokens)
    sequences = Sequences(cu_seqlens, max_seqlen)
    types, embeds = inputs.token_type_ids, inputs.inputs_embeds
    return Tokens(inputs.input_ids, position_ids, types, sequences, embeds, shape=(num_tokens,))


def _read_padded(inputs: Inputs, first: Tensor, shape: tuple[int, ...], static: bool) -> Tokens:
    """first: input_ids (B, S) or inputs_embeds (B, S, E); shape: (B, S). The inputs have position_ids."""
    mask = inputs.attention_mask
    if mask is None:
        mask = torch.ones(shape, dtype=torch.long, device=first.device)
    indices, sequences = (unpad_in_place if static else unpad)(mask)
    assert inputs.position_ids is not None, "position_ids were not set by read_tokens()"

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.flatten(0, 1)[indices]

    return Tokens(
        input_ids=pick(inputs.input_ids),
        position_ids=inputs.position_ids.flatten()[indices],
        token_type_ids=pick(inputs.token_type_ids),
        sequences=sequences,
        inputs_embeds=pick(inputs.inputs_embeds),
        indices=indices,
        shape=shape,
        padding=mask == 0 if static else None,
    )
