"""Replayed steps train as steps taken one by one do: same losses, weights, ranges, gates, statistics, optimizers.

CUDA graphs need a GPU. Here the operations of a step are recorded, and replayed on the memory they were recorded on
without running Python, which is what a graph does.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from pyro_bbits import GatePrior, quantize
from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.inference import Checkpoints, EmptyGuide, HardConcreteGuide, NonFiniteError, Recipe, fine_tune, fit
from pyro_bbits.inference import recipe as recipe_module
from pyro_bbits.inference.batches import MOST_KINDS, ResidentSource, StreamedSource
from pyro_bbits.inference.capture_audit import READS
from pyro_bbits.inference.captured import REHEARSALS
from pyro_bbits.inference.execution import Execution, _equal_parts
from pyro_bbits.inference.graphs import NotCapturedError
from pyro_bbits.inference.guides import StraightThroughGuide
from pyro_bbits.models import GatedModel, PlainModel

pytestmark = pytest.mark.filterwarnings("ignore:(every channel of|channel gates are undecided):UserWarning")


class Recorder(TorchDispatchMode):
    """Runs operations and remembers them with the tensors they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            self.reads.append(func._schema.name)
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and not shares_memory(old, new):
                        old.copy_(new)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class RecordedGraphs:
    """Takes the place of CUDA graphs. Recording takes the step, and so the first replay does not.

    Attributes:
        captures: How many steps were recorded.
        replays: How many were taken from a record.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        yield

    def rehearse(self, step: Callable[[], None]) -> None:
        with Recorder() as recorder:
            step()
        if recorder.reads:
            raise NotCapturedError(f"{recorder.reads[0]} asks the host")

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        with Recorder() as recorder:
            step()
        assert not recorder.reads
        self.captures += 1
        taken = True

        def replay() -> None:
            nonlocal taken
            if not taken:
                recorder.replay()
            taken = False
            self.replays += 1

        return replay

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        copied: Callable[[], list[float]] = values.clone().tolist
        return copied


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    """Captures steps, and has optimizers whose step counts are tensors, as on a GPU."""
    recorded = RecordedGraphs()
    monkeypatch.setattr(Execution, "graphs", lambda self, *_: recorded if self.capture else None)
    monkeypatch.setattr(recipe_module, "_on_gpu", lambda parameters: True)
    return recorded


class Images(nn.Module):
    """Convolution, batch norm, pooling, dropout and a residual sum: most of what a step can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(x + self.block(x), 2)
        logits: Tensor = self.head(self.drop(x.flatten(1)))
        return logits


X = torch.rand(46, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) * 8).long() % 3


def loader(kind: str) -> Any:
    if kind == "resident":
        return TensorLoader(X, Y, batch_size=8, shuffle=True, seed=3, augment=True, padding=1)
    if kind == "streamed":
        order = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=order)
    return [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 46, 8)]


def make(guide: str = "hard-concrete", **prior: Any) -> tuple[GatedModel, nn.Module]:
    torch.manual_seed(5)
    network = quantize(Images(), X[:16], bits=(2, 4, 8))
    model = GatedModel(network, GatePrior(network, 0.05, **prior), len(X))
    kind = HardConcreteGuide if guide == "hard-concrete" else StraightThroughGuide
    return model, kind(model.prior, init=1.0)


def trained(capture: bool, kind: str = "resident", epochs: int = 3, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model, guide = make(options.pop("guide", "hard-concrete"), **options.pop("prior", {}))
    settings: dict[str, Any] = {"recipe": Recipe(gate_lr=0.05), "seed": 2, "progress": False} | options
    history = fit(model, guide, loader(kind), loader("list"), epochs=epochs, capture=capture, **settings)
    return [replace(record, seconds=0) for record in history], copy.deepcopy(nn.ModuleList([model, guide]).state_dict())


def assert_same(a: tuple[Any, dict[str, Tensor]], b: tuple[Any, dict[str, Tensor]]) -> None:
    assert a[0] == b[0]
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), name


@pytest.mark.parametrize("kind", ["resident", "streamed", "list"])
def test_replayed_steps_are_the_steps_taken_one_by_one(graphs: RecordedGraphs, kind: str) -> None:
    """Bit for bit, over full and last batches, dropout, augmentation and drawn gates."""
    expected = trained(False, kind)
    assert graphs.replays == 0
    assert_same(trained(True, kind), expected)
    assert graphs.captures == 2  # five batches of 8 rows, one of 6
    assert graphs.replays == 3 * 6 - REHEARSALS - 1


@pytest.mark.parametrize(
    "options",
    [
        {"guide": "straight-through"},
        {"prior": {"simplified": True}},
        {"recipe": Recipe(gate_lr=0.05, weight_optimizer="sgd", schedule="cosine", anneal_ranges=True)},
        {"freeze_norms": True},
    ],
    ids=["straight-through", "simplified", "sgd with a rate for each step", "frozen norms"],
)
def test_replayed_steps_follow_every_option(graphs: RecordedGraphs, options: dict[str, Any]) -> None:
    assert_same(trained(True, epochs=2, **options), trained(False, epochs=2, **options))
    assert graphs.replays


def test_a_plain_network_is_captured_too(graphs: RecordedGraphs) -> None:
    results = []
    for capture in (True, False):
        torch.manual_seed(0)
        model = PlainModel(Images(), len(X))
        history = fit(model, EmptyGuide(), loader("resident"), epochs=2, seed=1, progress=False, capture=capture)
        results.append(([r.loss for r in history], model.state_dict()))
    assert_same(*results)
    assert graphs.replays


def test_pins_that_change_between_epochs_reach_the_graph(graphs: RecordedGraphs) -> None:
    """The gates of a captured step are read from the prior's tensors, not from what they were once."""

    def run(capture: bool) -> tuple[Any, dict[str, Tensor]]:
        model, guide = make()

        def pin(record: Any) -> None:
            if record.epoch == 2:
                model.prior.pin("*.input", bits=4)

        options: dict[str, Any] = {"recipe": Recipe(gate_lr=0.05), "seed": 2, "progress": False, "on_epoch": pin}
        history = fit(model, guide, loader("resident"), epochs=4, capture=capture, **options)
        assert set(history[-1].bits[1::2]) >= {4}
        return [r.loss for r in history], model.state_dict()

    assert_same(run(True), run(False))


def test_a_captured_run_goes_on_where_it_stopped(graphs: RecordedGraphs, tmp_path: Path) -> None:
    whole = trained(True, epochs=4)

    class StopError(Exception):
        pass

    def stop(record: Any) -> None:
        if record.epoch == 3:
            raise StopError

    with pytest.raises(StopError):
        trained(True, epochs=4, checkpoints=Checkpoints(tmp_path), on_epoch=stop)
    assert_same(trained(True, epochs=4, checkpoints=Checkpoints(tmp_path), resume=True), whole)


def test_fine_tuning_is_captured(graphs: RecordedGraphs) -> None:
    def run(capture: bool) -> tuple[Any, dict[str, Tensor]]:
        model, guide = make()
        options: dict[str, Any] = {"seed": 2, "progress": False, "capture": capture}
        history = fine_tune(model, guide, loader("resident"), epochs=2, **options)  # type: ignore[arg-type]
        return [r.loss for r in history], model.state_dict()

    assert_same(run(True), run(False))
    assert graphs.replays


class Reading(Images):
    """Decides on the host by a value that the device has computed."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * 2 if logits.sum() > 1e9 else logits


def test_a_step_that_reads_on_the_host_is_taken_one_by_one(graphs: RecordedGraphs) -> None:
    def run(capture: bool) -> Any:
        torch.manual_seed(0)
        model = PlainModel(Reading(), len(X))
        history = fit(model, EmptyGuide(), loader("resident"), epochs=2, seed=1, progress=False, capture=capture)
        return [r.loss for r in history]

    with pytest.warns(UserWarning, match="not captured in a CUDA graph: aten::(_local_scalar_dense|is_nonzero) asks"):
        captured = run("auto")  # type: ignore[arg-type]
    assert len(captured) == 2
    assert graphs.replays == 0
    with pytest.raises(NotCapturedError, match="asks the host"):
        run(True)


def test_a_loss_that_is_not_finite_is_found_with_its_step(graphs: RecordedGraphs) -> None:
    """Later than step by step, but with the same epoch and step."""
    messages = []
    for capture in (True, False):
        torch.manual_seed(0)
        model = PlainModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), len(X))
        recipe = Recipe(weight_lr=10.0, weight_optimizer="sgd")
        with torch.no_grad():
            model.net[1].weight.fill_(math.sqrt(torch.finfo(torch.float32).max))  # type: ignore[index]
        batches = [(x * 1e18, y) for x, y in loader("list")]
        with pytest.raises(NonFiniteError) as error:
            fit(model, EmptyGuide(), batches, epochs=9, recipe=recipe, progress=False, capture=capture)
        messages.append(str(error.value).split(";")[0].replace("inf", "nan"))
    assert messages[0] == messages[1]


def test_wrong_data_are_found_before_a_step(graphs: RecordedGraphs) -> None:
    for kind in ("resident", "list"):
        model, guide = make()
        before = copy.deepcopy(model.state_dict())
        data = loader(kind)
        if kind == "resident":
            data.targets = data.targets.clone()
            data.targets[0] = 7
        else:
            data[0] = (data[0][0], data[0][1] + 7)
        with pytest.raises(ValueError, match="labels must lie between 0 and 2"):
            fit(model, guide, data, epochs=1, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_capture_is_demanded_in_vain_without_a_gpu() -> None:
    model, guide = make()
    with pytest.raises(ValueError, match=r"capture=True needs a run on a GPU.*the model is on 'cpu'"):
        fit(model, guide, loader("list"), epochs=1, progress=False, capture=True)
    with pytest.raises(ValueError, match="capture must be True, False or 'auto'; got 'yes'"):
        fit(model, guide, loader("list"), epochs=1, progress=False, capture="yes")  # type: ignore[arg-type]


def test_precision_must_be_known_and_goes_back(graphs: RecordedGraphs) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    model, guide = make()
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, bf16 or None; got 'half'"):
        fit(model, guide, loader("list"), epochs=1, progress=False, precision="half")  # type: ignore[arg-type]
    fit(model, guide, loader("list"), epochs=1, progress=False, precision="tf32")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("change", ["temperature", "dropout", "requires_grad", "memory"])
def test_what_a_graph_takes_for_granted_may_change_between_epochs(graphs: RecordedGraphs, change: str) -> None:
    def run(capture: bool) -> tuple[Any, dict[str, Tensor]]:
        model, guide = make()
        net: Any = model.net.net

        def alter(record: Any) -> None:
            if record.epoch != 2:
                return
            if change == "temperature":
                guide.temperature = 0.3  # type: ignore[assignment]
            elif change == "dropout":
                net.drop.p = 0.6
            elif change == "requires_grad":
                net.stem.requires_grad_(False)
            else:
                net.head.weight.data = 0.5 * net.head.weight.data

        options: dict[str, Any] = {"recipe": Recipe(gate_lr=0.05), "seed": 2, "progress": False, "on_epoch": alter}
        history = fit(model, guide, loader("resident"), epochs=4, capture=capture, **options)
        return [r.loss for r in history], model.state_dict()

    assert_same(run(True), run(False))
    assert graphs.captures == 4


def test_what_happens_in_the_second_step_alone_may_read_on_the_host(graphs: RecordedGraphs) -> None:
    """DistributedDataParallel arranges its buckets there."""

    class Tuning(Images):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            Tuning.steps += self.training
            return logits if Tuning.steps != 2 else logits * float(logits.isfinite().all())

    torch.manual_seed(0)
    fit(PlainModel(Tuning(), len(X)), EmptyGuide(), loader("resident"), epochs=2, progress=False)
    assert graphs.replays


class Named(nn.Module):
    """Takes images and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Images()

    def forward(self, image: Tensor, names: list[str]) -> Tensor:
        assert len(names) == len(image)
        logits: Tensor = self.net(image)
        return logits


def test_batches_of_ever_new_kinds_pass_through_and_are_not_kept(graphs: RecordedGraphs) -> None:
    batches = [({"image": X[i : i + 2], "names": [f"{i}.png", f"{i + 1}.png"]}, Y[i : i + 2]) for i in range(0, 40, 2)]

    def run(capture: Any) -> list[float]:
        torch.manual_seed(0)
        model = PlainModel(Named(), len(X))
        history = fit(model, EmptyGuide(), batches, epochs=2, seed=1, progress=False, capture=capture)
        return [r.loss for r in history]

    with pytest.warns(UserWarning, match="some training steps are not captured .* too many kinds") as caught:
        captured = run("auto")
    assert sum("too many kinds" in str(w.message) for w in caught) == 1
    assert captured == run(False)
    with pytest.raises(NotCapturedError, match="names of files"):
        run(True)
    source = StreamedSource(batches, torch.device("cpu"), 4)
    assert [kind is None for kind in source.begin(None)] == [False] * MOST_KINDS + [True] * (20 - MOST_KINDS)


@pytest.mark.parametrize(("together", "sizes"), [(1, [8, 8, 8]), (2, [16, 8])])
def test_recent_batches_are_joined_as_far_as_wanted(together: int, sizes: list[int]) -> None:
    loader, device = TensorLoader(X[:32], Y[:32], 8), torch.device("cpu")
    sources = ResidentSource(loader, 20, together=together), StreamedSource(loader, device, 20, together)
    for source in sources:
        assert len(list(source.begin(None))) == 4
        recent = list(source.recent())
        assert [len(y) for _, y in recent] == sizes
        assert torch.equal(torch.cat([x for x, _ in recent]), X[8:32])


def test_a_loader_may_give_other_than_its_length(graphs: RecordedGraphs) -> None:
    class Longer(list[Any]):
        def __len__(self) -> int:
            return 5

    def run(capture: bool) -> list[float]:
        torch.manual_seed(0)
        model = PlainModel(Images(), len(X))
        batches = Longer([(X[:8], Y[:8])] * 140)
        history = fit(model, EmptyGuide(), batches, epochs=1, seed=1, progress=False, capture=capture)
        return [r.loss for r in history]

    assert run(True) == pytest.approx(run(False), rel=1e-6)


def test_parts_are_known_to_be_equal_where_all_processes_share_a_plan() -> None:
    shared = TensorLoader(X, Y, batch_size=8, shuffle=True, rank=1, world_size=2)
    assert _equal_parts(shared, 2)
    assert not _equal_parts(shared, 4)
    assert not _equal_parts(TensorLoader(X, Y, batch_size=8, shuffle=True), 2)  # each process with rows of its own
    assert not _equal_parts(TensorLoader(X, Y, batch_size=8, world_size=2), 2)  # a last batch may be cut unequally
    assert not _equal_parts(loader("list"), 2)


def test_graphs_are_let_go_when_training_is_interrupted(graphs: RecordedGraphs) -> None:
    model, guide = make()

    def interrupt(record: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, guide, loader("resident"), epochs=2, progress=False, on_epoch=interrupt)
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
