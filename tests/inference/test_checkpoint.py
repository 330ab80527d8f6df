"""A run that was killed goes on as if nothing had been; run as a script, this file is the run that is killed."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bbits import GatePrior, files, quantize
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import (
    AbstractGateGuide,
    Checkpoint,
    Checkpoints,
    EmptyGuide,
    EpochRecord,
    HardConcreteGuide,
    History,
    Recipe,
    checkpoint,
    evaluate,
    fine_tune,
    fit,
)
from pyro_bbits.models import GatedModel, PlainModel

pytestmark = pytest.mark.filterwarnings("ignore:every channel of:UserWarning")

EPOCHS = 5
KILLED = [
    "step 0",  # before there is any checkpoint
    "step 22",
    "write 1",  # while the first checkpoint is written
    "write 3",
    "best 1",  # between the checkpoint of an epoch and the best
    "prune 1",  # before old ones are removed
    "tune 9",  # in the fine-tuning
]


def points() -> tuple[Tensor, Tensor]:
    x = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > x[:, 1]).long()


def build() -> tuple[GatedModel, HardConcreteGuide]:
    """A network with batch norm and dropout: running statistics and masks belong to the state."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    network = quantize(net, points()[0])
    model = GatedModel(network, GatePrior(network, 0.05), 40)
    return model, HardConcreteGuide(model.prior, init=1.0)


def run(
    folder: Path | None, on_step: Callable[[str], object] = lambda _: None, loader: Iterable[Any] | None = None
) -> tuple[dict[str, Tensor], list[EpochRecord]]:
    """Train and fine-tune; final state and history without times."""
    model, guide = build()
    stage = ["step"]
    model.net.register_forward_pre_hook(lambda *_: on_step(stage[-1]))
    train = loader or TensorLoader(*points(), batch_size=16, shuffle=True, seed=3)
    options: dict[str, Any] = {"epochs": EPOCHS, "progress": False, "resume": "auto"}
    stages = [None if folder is None else Checkpoints(folder / name) for name in ("fit", "tune")]
    recipe = Recipe(weight_lr=0.02, gate_lr=0.3)
    history = fit(*(model, guide, train, [points()]), recipe=recipe, seed=5, checkpoints=stages[0], **options).epochs
    stage.append("tune")
    history = history + fine_tune(model, guide, train, [points()], checkpoints=stages[1], **options).epochs
    return ended(model, guide), [replace(record, seconds=0.0) for record in history]


def ended(*modules: nn.Module) -> dict[str, Tensor]:
    state = copy.deepcopy(nn.ModuleList(modules).state_dict())
    return state | {"generator": torch.get_rng_state()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def die_at(point: str) -> Callable[[str], None]:
    """Arrange that this process is killed at a point, e.g. at its third write."""
    kind, number = point.split()
    counts = {"step": 0, "tune": 0, "write": 0, "best": 0, "prune": 0}

    def count(what: str) -> None:
        if what == kind and counts[what] >= int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        counts[what] += 1

    def half_a_file(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        if kind == "write" and counts["write"] >= int(number):
            os.truncate(path, path.stat().st_size // 2)
        count("write")

    def copyfile(source: Path, target: Path) -> Any:
        count("best")
        return target.write_bytes(source.read_bytes())

    def paths(self: Checkpoints) -> list[Path]:
        found = original(self)
        if len(found) > self.keep:
            count("prune")
        return found

    original = Checkpoints.paths
    files.__dict__["save_file"] = half_a_file
    checkpoint.shutil.copyfile = copyfile  # type: ignore[attr-defined]
    Checkpoints.paths = paths  # type: ignore[method-assign]
    return count


def main(folder: str) -> None:
    """Train a run per point in a process of its own, which dies there; print how each ended."""
    ends = {}
    for point in KILLED:
        child = os.fork()
        if child == 0:
            run(Path(folder) / point, die_at(point))
            os._exit(0)
        ends[point] = os.waitpid(child, 0)[1]
    print(json.dumps(ends))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the runs that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, __file__, str(folder)]
    single = os.environ | {"OMP_NUM_THREADS": "1"}  # a pool of threads does not live through a fork
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=single)
    ends = json.loads(done.stdout)
    assert all(os.WIFSIGNALED(end) and os.WTERMSIG(end) == signal.SIGKILL for end in ends.values()), ends
    return folder


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, Tensor], list[EpochRecord]]:
    return run(None)


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forked")
@pytest.mark.parametrize("point", KILLED)
def test_a_killed_run_goes_on_exactly(killed: Path, uninterrupted: Any, point: str) -> None:
    """Weights, gates, ranges, prior, running statistics, generator and history, bit for bit."""
    before = sorted(path.name for path in (killed / point).glob("fit/*"))
    partial = [path for path in (killed / point).rglob("*") if path.name.startswith(files.PARTIAL)]
    assert bool(partial) == (point.split()[0] in ("write", "best")), "it died where it should"
    assert bool(before) == (point != "step 0")
    state, history = run(killed / point)
    assert history == uninterrupted[1]
    assert same(state, uninterrupted[0])
    left = sorted(path.name for path in (killed / point).glob("fit/*"))
    best = min(history[:EPOCHS], key=lambda r: r.validation_nll or 0)
    assert left == ["best.safetensors", "epoch-000004.safetensors", "epoch-000005.safetensors"]
    assert Checkpoint.load(killed / point / "fit" / "best.safetensors").epoch == best.epoch


def test_checkpoints_do_not_change_a_run(tmp_path: Path, uninterrupted: Any) -> None:
    state, history = run(tmp_path)
    assert same(state, uninterrupted[0]) and history == uninterrupted[1]


def test_a_finished_run_is_loaded_and_not_trained(tmp_path: Path, uninterrupted: Any) -> None:
    run(tmp_path)
    steps: list[str] = []
    state, history = run(tmp_path, on_step=steps.append)
    assert same(state, uninterrupted[0]) and history == uninterrupted[1]
    assert len(steps) == 2, "the held-out accuracy under drawn gates, once a stage"


class Stop(Exception):
    pass


@pytest.mark.parametrize("own", [False, True])
def test_torch_s_own_loader_goes_on(tmp_path: Path, own: bool) -> None:
    """Whether the order comes from the global generator or from one of the loader's own."""

    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(9) if own else None
        return DataLoader(TensorDataset(*points()), batch_size=16, shuffle=True, generator=generator)

    def interrupt(_: str) -> None:
        interrupt.calls += 1  # type: ignore[attr-defined]
        if interrupt.calls == 17:  # type: ignore[attr-defined]
            raise Stop

    interrupt.calls = 0  # type: ignore[attr-defined]
    whole = run(None, loader=loader())
    with pytest.raises(Stop):
        run(tmp_path, interrupt, loader())
    assert Checkpoints(tmp_path / "fit").paths(), "some epochs were completed"
    torch.manual_seed(1234)
    state, history = run(tmp_path, loader=loader())
    assert same(state, whole[0]) and history == whole[1]


def test_a_plain_model_goes_on(tmp_path: Path) -> None:
    def train(stop: int | None, where: Path) -> tuple[dict[str, Tensor], History]:
        torch.manual_seed(0)
        model = PlainModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 40)

        def on_epoch(record: EpochRecord) -> None:
            if record.epoch == stop:
                raise Stop

        loader = TensorLoader(*points(), batch_size=16, shuffle=True)
        saved = Checkpoints(where, every=2)
        history = fit(
            *(model, EmptyGuide(), loader), epochs=5, seed=1, progress=False, checkpoints=saved, resume="auto",
            on_epoch=on_epoch,
        )  # fmt: skip
        return ended(model), history

    whole, history = train(None, tmp_path / "whole")
    with pytest.raises(Stop):
        train(4, tmp_path / "run")
    assert [path.stem for path in Checkpoints(tmp_path / "run").paths()] == ["epoch-000002"]
    state, resumed = train(None, tmp_path / "run")
    assert same(state, whole) and [r.loss for r in resumed] == [r.loss for r in history]
    assert [path.stem for path in Checkpoints(tmp_path / "run").paths()] == ["epoch-000004", "epoch-000005"]
    assert not Checkpoints(tmp_path / "run").best_path.exists(), "nothing was held out"


def test_time_goes_on(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path)
    model, guide = build()
    fit(model, guide, [points()], epochs=1, progress=False, checkpoints=folder)
    path = folder.paths()[0]
    saved = Checkpoint.load(path)
    aged = saved.history
    aged.epochs[0] = replace(aged[0], seconds=1000.0)
    facts = saved.facts | {"history": aged.to_text(), "run": saved.facts["run"] | {"epochs": 2}}
    Checkpoint(saved.tensors, facts | {"run": facts["run"] | {"epochs": 2}}).save(path)
    model, guide = build()
    recipe = Recipe(gate_lr=None)
    history = fit(model, guide, [points()], epochs=2, recipe=recipe, progress=False, checkpoints=folder, resume=True)
    assert [r.epoch for r in history] == [1, 2] and history[1].seconds >= 1000


# --- what is refused --------------------------------------------------------------------------------------------------


def started(folder: Path, **changes: Any) -> History:
    model, guide = changes.pop("pair", None) or build()
    options: dict[str, Any] = {"epochs": 2, "progress": False, "checkpoints": Checkpoints(folder), "resume": "auto"}
    return fit(model, guide, [points()], **(options | changes))


def other_network() -> tuple[GatedModel, AbstractGateGuide]:
    network = quantize(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), points()[0])
    model = GatedModel(network, GatePrior(network, 0.05), 40)
    return model, HardConcreteGuide(model.prior)


def other_prior() -> tuple[GatedModel, AbstractGateGuide]:
    model, _ = build()
    prior = GatePrior(model.net, 0.2)
    return GatedModel(model.net, prior, 40), HardConcreteGuide(prior)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "a run with epochs 2, and this one has 3; resume with the same settings, or use another"),
        ({"seed": 4}, "a run with seed None, and this one has 4"),
        ({"freeze_norms": True}, "a run with freeze_norms False, and this one has True"),
        ({"rule": "threshold"}, "a run with rule map, and this one has threshold"),
        ({"recipe": Recipe(gate_lr=0.5)}, r"recipe\.gate_lr None, and this one has 0\.5"),
        ({"pair": other_network()}, "that of another network"),
        ({"pair": other_prior()}, r"mu 0\.05, and this one has 0\.2"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_checkpoints_of_another_run_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    started(tmp_path)
    started(tmp_path, validation=[points()])  # nothing that is trained depends on it
    with pytest.raises(ValueError, match=message):
        started(tmp_path, **change)


def test_a_fit_does_not_go_on_from_a_fine_tuning(tmp_path: Path) -> None:
    model, guide = build()
    recipe = Recipe()
    fine_tune(model, guide, [points()], epochs=2, recipe=recipe, progress=False, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ValueError, match="fixed gates True, and this one has False"):
        started(tmp_path, recipe=recipe)


def test_a_folder_in_use_is_not_begun_anew(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of another run; pass resume=True"):
        started(tmp_path, resume=False)


def test_resuming_needs_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*resume='auto' starts a run"):
        started(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"needs the checkpoints to go on from"):
        started(tmp_path, resume=True, checkpoints=None)
    with pytest.raises(ValueError, match="must be True, False or 'auto'; got 'yes'"):
        started(tmp_path, resume="yes")


@pytest.mark.parametrize("name", ["keep", "every"])
def test_numbers_of_checkpoints_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        Checkpoints(tmp_path, **{name: 0})


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path: Path) -> None:
    started(tmp_path)
    old, new = Checkpoints(tmp_path).paths()
    new.write_bytes(new.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"epoch-000002.* cannot be read: .* The one of epoch 1 is used"):
        found = Checkpoints(tmp_path).latest()
    assert found is not None and found.epoch == 1
    old.write_bytes(b"")
    with pytest.raises(ValueError, match=r"the checkpoint .*epoch-000002\.safetensors cannot be read"):
        Checkpoints(tmp_path).latest()


@pytest.mark.parametrize("kind", ["weights", "facts", "version"])
def test_other_files_are_no_checkpoints(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "epoch-000001.safetensors"
    header = {"format": "pyro-bbits/checkpoint", "version": "1", "facts": "[]"}
    changed = {"weights": {"a": "b"}, "facts": header, "version": header | {"version": "2"}}[kind]
    save_file({"a": torch.ones(1)}, path, changed)
    with pytest.raises(ValueError, match="cannot be read"):
        Checkpoint.load(path)


def test_a_full_disk_is_one_error_and_the_checkpoint_before_survives(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk: the system refuses to write on."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record: EpochRecord) -> None:
        if record.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(OSError, match=r"epoch-000002\.safetensors cannot be written: .*kept"):
            started(tmp_path, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-000001.safetensors"]
    assert len(started(tmp_path)) == 2


def test_what_was_left_by_a_killed_writer_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{files.PARTIAL}epoch-000001.safetensors.abc").write_bytes(b"half")
    started(tmp_path)
    assert not list(tmp_path.glob(f"{files.PARTIAL}*"))


def test_the_best_checkpoint_evaluates_as_its_record_says(tmp_path: Path) -> None:
    """Its weights with the statistics kept beside them."""
    history = started(tmp_path, epochs=4, validation=[points()], recipe=Recipe(weight_lr=0.05, gate_lr=0.01))
    best = Checkpoint.load(Checkpoints(tmp_path).best_path)
    model, guide = build()
    best.load_into(model, guide)
    record = min(history, key=lambda r: r.validation_nll or 0)
    assert best.epoch == record.epoch
    assert evaluate(model, [points()], guide.hard_gates()).nll == record.validation_nll
    assert load_file(Checkpoints(tmp_path).best_path).keys() == best.tensors.keys()


if __name__ == "__main__":
    main(sys.argv[1])


def test_the_best_epoch_is_the_best_that_was_saved(tmp_path: Path) -> None:
    """Not spoilt by epochs that were never saved, nor by one whose likelihood is NaN."""

    def checkpoint_of(*losses: float) -> Checkpoint:
        epochs = [EpochRecord(i + 1, 0.0, validation_nll=nll) for i, nll in enumerate(losses)]
        text = History((), (), epochs).to_text()
        return Checkpoint({"x": torch.zeros(1)}, {"epoch": len(losses), "run": {}, "history": text})

    checkpoints = Checkpoints(tmp_path, every=2)
    checkpoints.save(checkpoint_of(3.0, math.nan), 9)
    assert not checkpoints.best_path.exists()
    checkpoints.save(checkpoint_of(3.0, math.nan, 1.0, 2.5), 9)
    every = Checkpoints(tmp_path, every=1)
    every.save(checkpoint_of(3.0, math.nan, 1.0, 2.5, 2.4), 9)
    assert Checkpoint.load(every.best_path).epoch == 5
    every.save(checkpoint_of(3.0, math.nan, 1.0, 2.5, 2.4, 2.6), 9)
    assert Checkpoint.load(every.best_path).epoch == 5


def test_a_run_with_other_prices_or_pins_is_another_run(tmp_path: Path) -> None:
    def train(pin: bool) -> None:
        model, guide = build()
        if pin:
            model.prior.pin("0.weight", bits=8)
        train_loader = TensorLoader(*points(), batch_size=16, shuffle=True, seed=3)
        fit(model, guide, train_loader, epochs=1, progress=False, checkpoints=Checkpoints(tmp_path), resume="auto")

    train(pin=False)
    with pytest.raises(ValueError, match="prior"):
        train(pin=True)
