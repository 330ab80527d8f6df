"""Every method goes through `fit` and `evaluate`, and costs what is counted by hand."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, QuantizedNetwork, quantize
from pyro_bbits.inference import Checkpoint, Checkpoints, EmptyGuide, HostReads, evaluate, fit
from pyro_bbits.inference.baselines import BASELINES, Baseline, RuleModel
from pyro_bbits.inference.compiled import pays_to_compile
from pyro_bbits.inference.objective import elbo_module

Make = Callable[..., Baseline]
Batches = list[tuple[Tensor, Tensor]]
OPTIONS: dict[str, dict[str, Any]] = {"ternary": {"activation_bits": 4}, "binary": {"activation_bits": 4}}


@pytest.mark.parametrize("name", BASELINES)
def test_fit_lowers_the_loss_and_leaves_the_network_given_alone(
    name: str, make: Make, net: nn.Module, batches: Batches
) -> None:
    before = copy.deepcopy(net.state_dict())
    baseline = make(BASELINES[name], **OPTIONS.get(name, {}))
    history = fit(
        baseline.model, baseline.guide, batches, batches, recipe=baseline.recipe, epochs=4, seed=0, progress=False
    )
    assert history[-1].loss < history[0].loss
    result = evaluate(baseline.model, batches, baseline.gates())
    assert result.nll == pytest.approx(history[-1].validation_nll, rel=1e-5)
    if baseline.gates() is not None:
        assert baseline.relative_bops() == pytest.approx(history[-1].bops)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lsq", "pact", "dq", "ternary", "binary", "float32", "bfloat16"])
def test_a_step_reads_nothing_on_the_host(name: str, make: Make, batches: Batches) -> None:
    baseline = make(BASELINES[name], **OPTIONS.get(name, {}))
    elbo = elbo_module(baseline.model, baseline.guide)
    elbo(*batches[0]).backward()  # what happens once
    with pyro.validation_enabled(False), HostReads() as audit:
        elbo(*batches[0]).backward()
    assert audit.found == []


@pytest.mark.parametrize("name", ["lsq", "pact", "dq"])
def test_learned_quantizers_are_saved_and_other_ones_refused(
    name: str, make: Make, batches: Batches, tmp_path: Path
) -> None:
    def run(baseline: Baseline, *, resume: bool) -> Baseline:
        fit(
            baseline.model,
            baseline.guide,
            batches,
            recipe=baseline.recipe,
            epochs=2,
            progress=False,
            checkpoints=Checkpoints(tmp_path),
            resume=resume,
        )
        return baseline

    trained = run(make(BASELINES[name]), resume=False)
    loaded = make(BASELINES[name])
    Checkpoint.load(Checkpoints(tmp_path).paths()[-1]).load_into(loaded.model, loaded.guide)
    torch.testing.assert_close(loaded.model.state_dict(), trained.model.state_dict(), rtol=0, atol=0)
    started = make(BASELINES[name])
    assert not torch.equal(rule_vector(started), rule_vector(trained))
    torch.testing.assert_close(rule_vector(run(started, resume=True)), rule_vector(trained), rtol=0, atol=0)
    with pytest.raises(ValueError, match="network"):
        run(make(BASELINES[name], bits=(3, 3)), resume=True)


def rule_vector(baseline: Baseline) -> Tensor:
    """All parameters of a rule."""
    network = baseline.model.net
    assert isinstance(network, QuantizedNetwork) and network.rule is not None
    return torch.cat([p.detach().flatten() for p in network.rule.parameters()])


def test_a_network_with_a_rule_has_no_bit_configuration(make: Make) -> None:
    network = make(BASELINES["lsq"]).model.net
    assert isinstance(network, QuantizedNetwork)
    with pytest.raises(ValueError, match="TensorRule"):
        BitConfiguration.from_gates(network, network.open_gates())


def test_a_network_with_a_rule_is_not_compiled_unless_asked(make: Make, batches: Batches) -> None:
    x = batches[0][0]
    assert not pays_to_compile(make(BASELINES["lsq"]).model, x, 10**12)
    assert pays_to_compile(make(BASELINES["uniform"]).model, x, 10**12)


def test_a_rule_model_needs_a_rule(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="no rule"):
        RuleModel(quantize(net, torch.rand(4, 1, 6, 6)), 48)


def test_nothing_is_random_where_nothing_is_decided(make: Make) -> None:
    for name in ("lsq", "pact", "dq", "ternary", "binary", "float32", "bfloat16"):
        baseline = make(BASELINES[name])
        assert isinstance(baseline.guide, EmptyGuide) and baseline.gates() is None


@pytest.mark.parametrize(
    ("name", "options", "weights", "inputs"),
    [
        ("float32", {}, (32, 32, 32), (32, 32)),
        ("bfloat16", {}, (16, 16, 16), (16, 16)),
        ("uniform", {"bits": (2, 2)}, (2, 2, 2), (2, 2)),
        ("uniform", {"bits": (4, 8)}, (4, 4, 4), (8, 8)),
        ("uniform", {"bits": (2, 4), "edge_bits": 8}, (8, 2, 8), (4, 8)),
        ("lsq", {"bits": (3, 3)}, (3, 3, 3), (3, 3)),
        ("lsq", {"bits": (2, 2), "edge_bits": 8}, (8, 2, 8), (2, 8)),
        ("pact", {"bits": (2, 4)}, (32, 2, 32), (4, 32)),
        ("dq", {"bits": (8, 5)}, (8, 8, 8), (5, 5)),
        ("dq", {"bits": (8, 5), "powers_of_two": True}, (8, 8, 8), (8, 8)),
        ("ternary", {}, (2, 2, 2), (32, 32)),
        ("ternary", {"activation_bits": 8, "edge_bits": 32}, (32, 2, 32), (8, 32)),
        ("binary", {}, (1, 1, 1), (32, 32)),
        ("binary", {"activation_bits": 4, "edge_bits": 8}, (8, 1, 8), (4, 8)),
        ("l0", {}, (32, 32, 32), (32, 32)),
        ("pruning-only", {"bits": (4, 8)}, (4, 4, 4), (8, 8)),
        ("quantization-only", {"bits": (2, 4, 8)}, (8, 8, 8), (8, 8)),
        ("straight-through", {"bits": (2, 4, 8)}, (8, 8, 8), (8, 8)),
    ],
)
def test_bops_are_those_counted_by_hand(
    name: str,
    options: dict[str, Any],
    weights: tuple[float, float, float],
    inputs: tuple[float, float],
    make: Make,
    count: Callable[..., float],
) -> None:
    baseline = make(BASELINES[name], **options)
    assert baseline.name == name
    assert baseline.relative_bops() == pytest.approx(count(weights, inputs), rel=1e-6)
    assert baseline.bits() == dict(
        zip(("0.weight", "3.weight", "6.weight", "3.input", "6.input"), (*weights, *inputs), strict=True)
    )
    network = baseline.model.net
    if isinstance(network, QuantizedNetwork) and network.rule is None:
        gates = baseline.gates()
        assert gates is not None
        configuration = BitConfiguration.from_gates(network, gates)
        assert configuration.relative_bops == pytest.approx(baseline.relative_bops())
        assert configuration.bits() == baseline.bits()


@pytest.mark.parametrize("bits", [(0, 4), (4, 33)])
def test_widths_out_of_range_are_refused(bits: tuple[int, int], make: Make) -> None:
    with pytest.raises(ValueError, match="between 1 and 32"):
        make(BASELINES["lsq"], bits=bits)
