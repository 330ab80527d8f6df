"""The master graph holds the frozen network's numbers under the names of its modules, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, freeze, quantize
from pyro_bbits.analysis.export.graph import Quant, master_graph, quants
from pyro_bbits.deployment import frozen_layers


def by_name(model: ir.Model) -> dict[str, Quant]:
    return {quant.name: quant for quant in quants(model)}


def test_every_tensor_of_the_configuration_is_there_under_its_name(mixed: Any, master: Callable[[], ir.Model]) -> None:
    _, configuration, _ = mixed
    found = by_name(master())
    assert {name: quant.bits for name, quant in found.items()} == configuration.bits()
    assert {name: quant.signed for name, quant in found.items()} == {t.name: t.signed for t in configuration.tensors}


def test_codes_and_scales_are_those_of_the_frozen_layers(mixed: Any, master: Callable[[], ir.Model]) -> None:
    found = by_name(master())
    for path, layer in frozen_layers(mixed[0]).items():
        quant = found[f"{path}.weight"]
        np.testing.assert_array_equal(quant.codes, layer.codes.numpy())
        np.testing.assert_array_equal(quant.scale, layer.weight_scale.numpy())
        if layer.input_quantizer is not None:
            assert found[f"{path}.input"].scale == layer.input_quantizer.scale.numpy()
    assert found["second.weight"].axis == 0 and found["last.weight"].axis is None


def test_a_tensor_that_two_layers_read_is_quantized_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            y: Tensor = self.a(x) * self.b(x)
            return y

    net, x = Twice().eval(), torch.randn(8, 2, 4)
    network = quantize(net, x, bits=(2, 4, 8))
    frozen = freeze(Twice(), BitConfiguration.from_gates(network, network.open_gates()))
    model = master_graph(frozen, x)
    found = by_name(model)
    assert sorted(name for name in found if name.endswith("input")) == ["a.input"]
    # a linear layer of three axes multiplies by the transposed weight: it is stored that way
    assert not [node for node in model.graph if node.op_type == "Transpose"]
    np.testing.assert_array_equal(found["b.weight"].codes, frozen_layers(frozen)["b"].codes.numpy().T)


def test_files_say_nothing_of_the_source_code(master: Callable[[], ir.Model]) -> None:
    content = ir.to_proto(master()).SerializeToString()
    assert b"forward" not in content and str(Path(__file__).parents[1]).encode() not in content


def test_what_cannot_be_exported_is_refused_in_one_sentence(mixed: Any) -> None:
    net, _, rows = mixed
    with pytest.raises(TypeError, match="frozen network"):
        master_graph(nn.Linear(2, 2), torch.rand(1, 2))
    with pytest.raises(ValueError, match="opset must be at least 18; got 17"):
        master_graph(net, rows.inputs, opset=17)
    with pytest.raises(ValueError, match="at least one row"):
        master_graph(net, rows.inputs[:0])

    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(ValueError, match="exporter refuses this network"):
        master_graph(Undecided(), rows.inputs[:2])


def test_code_that_fixes_the_number_of_rows_is_named_and_not_left_at_that(mixed: Any) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = frozen_layers(mixed[0])["head"]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x.reshape(len(x), 6))
            return y

    with pytest.raises(ValueError, match=r"len\(x\) does, x.shape\[0\] does not"):
        master_graph(Fixed(), torch.rand(3, 2, 3))
