"""Products of two activations: found wherever they are made, quantized, counted and kept in a configuration."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, NetworkCost, quantize
from pyro_bbits.insertion.products import WatchProducts, product_name, product_place
from pyro_bbits.quantizer import quantize_fixed

Case = tuple[nn.Module, Mapping[str, Tensor]]
A, B = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
Q, K, V = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 3)

FORMS: dict[str, Callable[[], Tensor]] = {
    "matmul": lambda: torch.matmul(A, B),
    "keywords": lambda: torch.matmul(input=A, other=B),
    "operator": lambda: A @ B,
    "method": lambda: A.matmul(B),
    "reflected": lambda: B.__rmatmul__(A),
    "bmm": lambda: torch.bmm(A, mat2=B),
    "bmm method": lambda: A.bmm(B),
    "baddbmm": lambda: torch.baddbmm(torch.ones(2, 3, 5), A, B, beta=2),
    "einsum": lambda: torch.einsum("bij,bjk->bik", A, B),
    "einsum of a list": lambda: torch.einsum("bij,bjk->bik", [A, B]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_every_form_hands_over_its_operands_in_order(form: Callable[[], Tensor]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def visit(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((left, right))
        return left, right

    expected = form()
    with WatchProducts(visit):
        actual = form()
    assert torch.equal(actual, expected)
    assert len(seen) == 1
    assert seen[0][0] is A
    assert seen[0][1] is B


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_what_the_visitor_returns_is_multiplied(form: Callable[[], Tensor]) -> None:
    with WatchProducts(lambda left, right: (left * 0, right)):
        actual = form()
    assert (actual == (2 if "baddbmm" in str(form.__code__.co_names) else 0)).all()


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril()},
    "additive mask": {"attn_mask": torch.randn(5, 7)},
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=list(ATTENTIONS))
def test_attention_in_two_products_equals_the_fused_one(options: dict[str, Any]) -> None:
    seen: list[tuple[int, ...]] = []

    def visit(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend([tuple(left.shape), tuple(right.shape)])
        return left, right

    with WatchProducts(visit):
        actual = F.scaled_dot_product_attention(Q, K, V, **options)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(Q, K, V, **options))
    assert seen == [Q.shape, K.shape, (2, 4, 5, 7), V.shape]


def test_grouped_queries_equal_the_fused_ones() -> None:
    with WatchProducts(lambda left, right: (left, right)):
        actual = F.scaled_dot_product_attention(Q, K[:, :2], V[:, :2], enable_gqa=True)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(Q, K[:, :2], V[:, :2], enable_gqa=True))


def test_attention_drops_out_in_training() -> None:
    """With half the weights dropped and the rest doubled, uniform attention to ones gives 0, 2 or so, 1 on average."""
    torch.manual_seed(0)
    ones, zeros = torch.ones(1, 400, 1), torch.zeros(1, 400, 1)
    with WatchProducts(lambda left, right: (left, right)):
        result = F.scaled_dot_product_attention(zeros, zeros, ones, dropout_p=0.5)
    assert result.mean().item() == pytest.approx(1, abs=0.02)
    assert result.std().item() == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize(("owner", "index"), [("", 0), ("attention", 1), ("blocks.0.matmul3", 12)])
def test_names_tell_the_place(owner: str, index: int) -> None:
    assert product_place(product_name(owner, index)) == (owner, index)


class Bilinear(nn.Module):
    """A product with the network's input, one with a parameter, one of a tensor with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(x))  # (batch, 5, 4)
        y = (y @ y.mT) @ y  # one tensor three times
        y = x.mT.mT @ (y.mT @ x) @ self.weight
        logits: Tensor = self.head(y.mean(1))
        return logits


def test_each_operand_is_a_tensor_of_its_own_kind() -> None:
    network = quantize(Bilinear(), torch.randn(6, 5, 4))
    names: dict[int | None, str] = dict(enumerate(network.layout.tensors)) | {None: "the input"}
    operands = {layer.name: (names[layer.input], names[layer.weight]) for layer in network.layers if layer.is_product}
    assert operands == {
        "matmul0": ("matmul0.left", "matmul0.left"),
        "matmul1": ("matmul1.left", "matmul0.left"),
        "matmul2": ("matmul2.left", "the input"),
        "matmul3": ("the input", "matmul3.right"),
        "matmul4": ("matmul4.left", "matmul4.right"),
    }
    assert [layer.macs for layer in network.layers] == [80, 5 * 5 * 4, 5 * 5 * 4, 4 * 5 * 4, 5 * 4 * 4, 5 * 4 * 3, 6]


def test_bops_of_products_count_both_widths_and_a_square_once() -> None:
    network = quantize(Bilinear(), torch.randn(6, 5, 4), bits=(2, 4))
    cost, gates = NetworkCost(network), network.open_gates()
    bops = dict(zip(cost.names, cost.layer_bops(gates).tolist(), strict=True))
    assert bops["matmul0"] == 4 * 4 * 100
    assert bops["matmul2"] == 4 * 8 * 80
    half = gates._replace(tensors=torch.full_like(gates.tensors, 0.5))  # 2 or 4 bits, evenly
    bops = dict(zip(cost.names, cost.layer_bops(half).tolist(), strict=True))
    assert bops["matmul0"] == (4 + 16) / 2 * 100  # the two operands agree
    assert bops["matmul1"] == 3 * 3 * 100


def test_operands_are_quantized_as_told() -> None:
    torch.manual_seed(0)

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.enter(x)
            return y @ F.relu(y).mT

    net, x = Square(), torch.randn(4, 2, 3)
    network = quantize(net, x, bits=(2, 4, 32))
    gates = network.open_gates()
    gates.tensors[network.layout.tensors.index("matmul0.left")] = torch.tensor([1.0, 0.0])
    gates.tensors[network.layout.tensors.index("matmul0.right")] = torch.tensor([0.0, 0.0])
    y = net.enter(x)
    left = quantize_fixed(y, y.abs().max().detach(), 4, signed=True)
    right = quantize_fixed(F.relu(y), y.max().detach(), 2, signed=False)
    torch.testing.assert_close(network(x, gates=gates), left @ right.mT, rtol=1e-5, atol=1e-6)
    fixed = BitConfiguration.from_gates(network, gates).apply(net)
    torch.testing.assert_close(fixed(x), left @ right.mT, rtol=1e-5, atol=1e-6)
    assert {name for name, _ in fixed.named_modules()} == {"", "enter", "matmul0_left", "matmul0_right"}
    assert dict(fixed.named_parameters()).keys() == dict(net.named_parameters()).keys()


class Growing(nn.Module):
    """As many products as the sequence is long, at most two."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.enter(x)
        for _ in range(min(x.shape[1], 2)):
            y = y @ y.mT @ y
        return y


def test_products_that_the_examples_did_not_show_are_an_error() -> None:
    network = quantize(Growing(), torch.randn(4, 1, 3))
    gates = network.open_gates()
    with pytest.raises(RuntimeError, match=r"made 4 products .* and 2 on the example .* exclude=\('matmul\*',\)"):
        network(torch.randn(4, 2, 3), gates=gates)
    fixed = BitConfiguration.from_gates(network, gates).apply(Growing())
    with pytest.raises(RuntimeError, match=r"made 4 products .* and 2 on the example"):
        fixed(torch.randn(4, 2, 3))
    network = quantize(Growing(), torch.randn(4, 2, 3))
    with pytest.raises(RuntimeError, match=r"made 2 products .* and 4 on the example"):
        network(torch.randn(4, 1, 3), gates=network.open_gates())


class Outer(nn.Module):
    """Makes a product of its own after that of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.child = nn.Linear(3, 3), Growing()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.enter(x)
        result: Tensor = y @ self.child(y).mT
        return result


def test_products_of_an_excluded_child_are_not_counted_as_its_parents() -> None:
    x = torch.randn(4, 2, 3)
    network = quantize(Outer(), x, exclude=("child",))
    assert [layer.name for layer in network.layers] == ["enter", "matmul0"]
    with torch.no_grad():
        gated = network.eval()(x, gates=network.open_gates())
        net = Outer()
        net.load_state_dict(network.net.state_dict())
        assert torch.equal(BitConfiguration.from_gates(network, network.open_gates()).apply(net)(x), gated)


class Counting(nn.Module):
    """Counts in whole numbers, and turns phases in complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64)
        turned = torch.einsum("bij,jk->bik", torch.complex(x, x), torch.eye(3, dtype=torch.complex64)).abs()
        y: Tensor = self.enter(turned) * steps[0, 0]
        return y


@pytest.mark.filterwarnings("ignore:.* of the multiplications stay in float")
def test_integers_and_complex_numbers_are_left_alone() -> None:
    network = quantize(Counting(), torch.randn(4, 2, 3))
    assert [layer.name for layer in network.layers] == ["enter"]


def test_rows_without_a_key_are_zero_as_in_torch() -> None:
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    query = Q.clone().requires_grad_()
    with WatchProducts(lambda left, right: (left, right)):
        actual = F.scaled_dot_product_attention(query, K, V, attn_mask=mask)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(Q, K, V, attn_mask=mask))
    actual.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all() and (query.grad[:, :, 2] == 0).all()


def test_products_can_be_left_in_float(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("attention")
    whole = quantize(net, example)
    network = quantize(net, example, exclude=("matmul1",))
    assert {layer.name for layer in whole.layers} - {layer.name for layer in network.layers} == {"matmul1"}
    (left,) = network.float_layers
    assert (left.name, left.kind, left.is_excluded) == ("matmul1", "MatMul", True)
    assert left.macs == next(layer.macs for layer in whole.layers if layer.name == "matmul1")
    assert not any(name.startswith("matmul1") for name in network.layout.tensors)
    torch.testing.assert_close(network(**example, gates=network.open_gates()), net(**example), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "windows", "language", "encoder"])
def test_copies_and_pickles_make_their_own_products(build_case: Callable[[str], Case], name: str) -> None:
    net, example = build_case(name)
    network = quantize(net, example)
    gates = network.open_gates()
    with torch.no_grad():
        expected = network(**example, gates=gates)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.no_grad():
            assert torch.equal(other(**example, gates=gates), expected)
            for parameter in network.parameters():
                parameter.mul_(1.0)
            other.quantizers.log_range.sub_(2.0)  # clips the copy's operands, not the original's
            assert not torch.equal(other(**example, gates=gates), expected)
            assert torch.equal(network(**example, gates=gates), expected)
