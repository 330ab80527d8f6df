"""`nn.MultiheadAttention` spelled out in linear layers and products, so that these can be quantized."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ExpandedAttention", "expand_attention"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ExpandedAttention(nn.Module):
    r"""Multi-head attention as four linear layers and two products, equal to the module it is made from.

    .. math:: \mathrm{out}(\mathrm{softmax}(q k^T / \sqrt{d} + \mathrm{mask}) \, v)

    Its state dict has the names of :class:`torch.nn.MultiheadAttention`.

    Arguments:
        module: The attention to copy.

    Raises:
        ValueError: If it was made with `add_bias_kv` or `add_zero_attn`.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        for option, used in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
            if used:
                raise ValueError(f"nn.MultiheadAttention with {option} is not supported")
        self.embed_dim, self.num_heads, self.dropout = module.embed_dim, module.num_heads, module.dropout
        self.head_dim, self.is_sequence_first = module.head_dim, not module.batch_first
        # what torch's encoder layers look at: no fast path leads past the linear layers
        self.batch_first, self._qkv_same_embed_dim, self.in_proj_bias = True, False, None
        self.is_packed = bool(module.in_proj_weight is not None)
        weights = module.in_proj_weight.chunk(3) if self.is_packed else _separate_weights(module)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias))
        self.out_proj = _linear(module.out_proj.weight, module.out_proj.bias)
        self.train(module.training)
        self.register_state_dict_post_hook(_pack)
        self.register_load_state_dict_pre_hook(_unpack)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of :class:`torch.nn.MultiheadAttention`."""
        if query.dim() != 3:
            raise ValueError(f"attention needs batches of sequences, three dimensions; got {tuple(query.shape)}.")
        query, key, value = self._project(query, key, value)
        mask = self._mask(query.dtype, key_padding_mask, attn_mask)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = torch.matmul(weights, value)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        result = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result.transpose(0, 1) if self.is_sequence_first else result, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """`(batch, heads, length, head)` each; a tensor that is given twice stays one tensor."""
        inputs = [query, key, value]
        if self.is_sequence_first:
            turned = {id(x): x.transpose(0, 1) for x in inputs}
            inputs = [turned[id(x)] for x in inputs]
        projected = [self.get_submodule(name)(x) for name, x in zip(PROJECTIONS, inputs, strict=True)]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]

    def _mask(self, dtype: torch.dtype, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """What is added to the scores, or None; torch wants a mask wherever `is_causal` is given, so that is a hint."""
        masks = []
        if padding is not None:  # (batch, keys)
            masks.append(_additive(padding, dtype)[:, None, None])
        if attention is not None:  # (queries, keys) or (batch x heads, queries, keys)
            attention = _additive(attention, dtype)
            masks.append(attention if attention.dim() == 2 else attention.unflatten(0, (-1, self.num_heads)))
        return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask says what is left out."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _separate_weights(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")  # draws no random numbers
    linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def _pack(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Name the projections as nn.MultiheadAttention does."""
    weights = [state.pop(f"{prefix}{name}.weight") for name in PROJECTIONS]
    if module.is_packed:
        state[f"{prefix}in_proj_weight"] = torch.cat(weights)
    else:
        state |= {f"{prefix}{name}_weight": weight for name, weight in zip(PROJECTIONS, weights, strict=True)}
    if f"{prefix}q_proj.bias" in state:
        state[f"{prefix}in_proj_bias"] = torch.cat([state.pop(f"{prefix}{name}.bias") for name in PROJECTIONS])


def _unpack(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The reverse of :func:`_pack`; what is missing stays missing, for load_state_dict to tell."""
    for suffix in ("weight", "bias"):
        packed = state.pop(f"{prefix}in_proj_{suffix}", None)
        parts = (None,) * 3 if packed is None else packed.chunk(3)
        for name, part in zip(PROJECTIONS, parts, strict=True):
            part = state.pop(f"{prefix}{name}_{suffix}", part)
            if part is not None:
                state[f"{prefix}{name}.{suffix}"] = part


def expand_attention(net: nn.Module, is_excluded: Callable[[str], object]) -> nn.Module:
    """Replace every `nn.MultiheadAttention` inside a network, in place, wherever its own class is used.

    Arguments:
        net: The network.
        is_excluded: Whether a module path is to stay as it is.

    Returns:
        The network, or its replacement if it is itself an attention.

    Raises:
        ValueError: If one has an option that is not supported; the message names it.
    """
    for module in net.modules():  # torch's fast paths read the weights past the layers, or repack what flows
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    made: dict[int, ExpandedAttention] = {}
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if type(module) is not nn.MultiheadAttention or is_excluded(name):
            continue
        if id(module) not in made:
            made[id(module)] = _expand(module, name)
        if not name:
            return made[id(module)]
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, made[id(module)])
    return net


def _expand(module: nn.MultiheadAttention, name: str) -> ExpandedAttention:
    try:
        return ExpandedAttention(module)
    except ValueError as error:
        raise ValueError(f"{name or 'the network'}: {error}; leave it in float, exclude=({name!r},).") from error
