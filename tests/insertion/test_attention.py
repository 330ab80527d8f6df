"""Attention spelled out equals torch's own, whatever its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import quantize
from pyro_bbits.insertion.attention import ExpandedAttention, expand_attention


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 3, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


PADDING = torch.tensor([[False] * 4, [False, False, True, True]])
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "additive padding": {"key_padding_mask": torch.zeros(2, 4).masked_fill(PADDING, -torch.inf)},
    "causal": {"attn_mask": causal(4), "is_causal": True},
    "additive": {"attn_mask": torch.randn(4, 4, generator=torch.Generator().manual_seed(1))},
    "per head": {"attn_mask": torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(2))},
    "both": {"attn_mask": causal(4), "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_equals_torch(batch_first: bool, mask: dict[str, Any], need_weights: bool) -> None:
    module, x = attention(batch_first=batch_first), torch.randn(2, 4, 6)
    x = x if batch_first else x.transpose(0, 1)
    expected = module(x, x, x, need_weights=need_weights, **mask)
    actual = ExpandedAttention(module)(x, x, x, need_weights=need_weights, **mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 4}, {"kdim": 6, "vdim": 4}])
def test_it_equals_torch_for_other_widths(options: dict[str, Any]) -> None:
    module = attention(batch_first=True, **options)
    x, key = torch.randn(2, 4, 6), torch.randn(2, 3, options.get("kdim", 6))
    value = torch.randn(2, 3, options.get("vdim", 6))
    for average in (True, False):
        expected = module(x, key, value, average_attn_weights=average)
        actual = ExpandedAttention(module)(x, key, value, average_attn_weights=average)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 4}])
def test_state_dicts_have_torchs_names_and_go_both_ways(options: dict[str, Any]) -> None:
    module = attention(**options)
    expanded = ExpandedAttention(module)
    state = expanded.state_dict()
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in module.state_dict().items()}
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.zero_()
    expanded.load_state_dict(module.state_dict())
    assert all(torch.equal(value, expanded.state_dict()[key]) for key, value in module.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        expanded.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("out_proj")})


def test_one_module_under_two_names_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(6, 3)
            self.second = nn.ModuleList([self.first])

    net = expand_attention(Shared(), lambda name: False)
    assert isinstance(net.first, ExpandedAttention)
    assert isinstance(net.second, nn.ModuleList)
    assert net.second[0] is net.first


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_options_without_an_equal_are_refused(option: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, **{option: True}), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
            return logits

    with pytest.raises(ValueError, match=rf"attention: .* {option} is not supported; .* exclude=\('attention',\)"):
        quantize(Net(), torch.randn(3, 5, 4))
    network = quantize(Net(), torch.randn(3, 5, 4), exclude="attention")
    assert [layer.name for layer in network.layers] == ["head"]


def test_an_excluded_attention_stays_torchs_own_and_is_counted(build_case: Callable[[str], Any]) -> None:
    net, example = build_case("language")
    network = quantize(net, example, exclude=("attention",))
    assert type(network.net.get_submodule("attention")) is nn.MultiheadAttention
    whole = quantize(net, example)
    inside = sum(layer.macs for layer in whole.layers if layer.name.startswith("attention."))
    assert sum(layer.macs for layer in network.float_layers) == inside > 0


def test_sequences_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"three dimensions; got \(4, 6\)"):
        ExpandedAttention(attention())(*[torch.randn(4, 6)] * 3)
