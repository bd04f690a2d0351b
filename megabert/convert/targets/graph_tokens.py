"""Unpad in a graph: compute all but attention on the real tokens only, whose number depends on the data.

Only gathers move tokens between rows and the list of tokens: graphs compute scatters on one core.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megabert.model.attention import Attend, plan_sdpa
from megabert.model.inputs import count_tokens
from megabert.model.modeling_megabert import MegaBertModel
from megabert.model.padding import Sequences, Tokens


class GraphTokens(NamedTuple):
    """T real tokens of rows (B, S). In attention, the real tokens of a row come first.

    indices: (T,) of the real tokens in the flattened rows. slots: (T,) where attention has them. token_of_slot:
    (B * S,) the token in each slot of attention, an arbitrary one in the slots after a row's last. token_of_place:
    (B * S,) the same for the rows as they were given. real: (B, S), as given. num_keys: (B,) real tokens of each row.
    """

    indices: Tensor
    slots: Tensor
    token_of_slot: Tensor
    token_of_place: Tensor
    real: Tensor
    num_keys: Tensor


def find_tokens(input_ids: Tensor, attention_mask: Tensor) -> GraphTokens:
    """Find the real tokens: where the mask is not 0 and the id not negative; if there is none, the first place is one.

    input_ids, attention_mask: (B, S).
    """
    # The ids are compared for their shape: a graph then refuses a mask of another one.
    given = (attention_mask != 0) & (input_ids >= 0)
    batch, length = given.shape
    place = torch.arange(batch * length, device=given.device)
    real = (given.flatten() | ((place == 0) & ~given.any())).view(batch, length)
    num_keys = real.sum(dim=1)
    ends = num_keys.cumsum(0)
    starts, last = (ends - num_keys)[:, None], ends[-1] - 1
    rank = real.long().cumsum(1) - 1
    indices = real.flatten().nonzero().flatten()
    position = torch.minimum(torch.arange(length, device=real.device), num_keys[:, None] - 1).clamp(min=0)
    row = torch.arange(batch, device=real.device)[:, None] * length
    return GraphTokens(
        indices=indices,
        slots=(row + rank).flatten().index_select(0, indices),
        token_of_slot=torch.minimum(starts + position, last).flatten(),
        token_of_place=torch.minimum((starts + rank).clamp(min=0), last).flatten(),
        real=real,
        num_keys=num_keys,
    )


def encode(model: MegaBertModel, input_ids: Tensor, found: GraphTokens) -> Tensor:
    """Return the last hidden states (T, E) of the real tokens of input_ids (B, S)."""
    batch, length = input_ids.shape
    bounds = torch.arange(batch + 1, device=input_ids.device) * length
    rows = Sequences(bounds, length, found.num_keys)

    def plan(_: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None) -> Attend:
        attend = plan_sdpa(rows, slopes, head_dim, reach)
        return lambda qkv, dropout_p: attend(qkv.index_select(0, found.token_of_slot), dropout_p).index_select(
            0, found.slots
        )

    model.encoder.planner = plan
    places = count_tokens(input_ids, model.config.pad_token_id if model.config.position_offset else None)
    ids, position_ids = (values.flatten().index_select(0, found.indices) for values in (input_ids, places))
    # num_keys is None: the encoder gets real tokens only, and the planner knows the rows.
    tokens = Tokens(ids, position_ids, None, Sequences(bounds, length))
    return model.encode(tokens)[0]


def spread(values: Tensor, found: GraphTokens) -> Tensor:
    """Restore the rows, with zeros at padding: (T, E) -> (B, S, E)."""
    rows = values.index_select(0, found.token_of_place).view(*found.real.shape, values.shape[-1])
    return torch.where(found.real[:, :, None], rows, 0.0)
