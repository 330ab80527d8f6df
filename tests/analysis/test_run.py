"""A run folder is made, checked, filled and read by fixed rules, and says what is wrong with another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, GatePrior, quantize
from pyro_bbits.analysis import GatePosterior
from pyro_bbits.analysis.report import layer_table, print_configuration, print_report
from pyro_bbits.analysis.run import RunFolder, load_weights, pick_device
from pyro_bbits.inference import EpochRecord, HardConcreteGuide, History
from pyro_bbits.settings import RunSettings

MakePosterior = Callable[..., GatePosterior]

PLOTS = ["bit_widths", "bops", "channels", "gates", "history"]
RESULTS = {"test_samples": 20, "rule": "map", "test_accuracy_float": 97.5, "test_accuracy": 91.25}


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


@pytest.fixture
def posterior(make_posterior: MakePosterior) -> GatePosterior:
    """Both rules differ: `map` has 4 bits and 1 channel in layer 0, `threshold` nothing of it."""
    return make_posterior("chain", channels=[0.6, 0.4], tensors=[[0.6, 0.1], [0.9, 0.6], [0.7, 0.7]])


@pytest.fixture
def history() -> History:
    names = ("0.weight", "2.weight", "2.input")
    return History(names, ("0",), [EpochRecord(e, 1.0, 0.1, 0.5, 80.0, 3.0, 2.0, (4, 8, 8), (1,)) for e in (1, 2)])


@pytest.fixture
def folder(tmp_path: Path, net: nn.Module, posterior: GatePosterior, history: History) -> RunFolder:
    """A finished run without plots."""
    folder = RunFolder.create(tmp_path / "run", RunSettings(seed=7))
    folder.save_network(net, posterior, "map")
    history.save(folder.history_file)
    folder.save_results(RESULTS)
    return folder


# --- which folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_a_run_begins_in_a_new_or_empty_folder(tmp_path: Path, before: str) -> None:
    path = tmp_path / "runs" / "first"
    if before == "empty":
        path.mkdir(parents=True)
    RunFolder.check(path)
    folder = RunFolder.create(path, RunSettings(mu=0.25))
    assert [file.name for file in path.iterdir()] == ["settings.yaml"]
    assert RunFolder.open(path) == folder and folder.settings() == RunSettings(mu=0.25)


def test_checking_makes_nothing(tmp_path: Path) -> None:
    RunFolder.check(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [RunFolder.check, lambda p, **k: RunFolder.create(p, RunSettings(), **k)])
def test_other_things_are_never_overwritten(
    tmp_path: Path, make: Callable[..., RunFolder | None], overwrite: bool
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"full is not empty and holds no run; choose another --output"):
        make(tmp_path / "full", overwrite=overwrite)
    with pytest.raises(ValueError, match=r"thesis\.tex is not a folder; choose another --output"):
        make(tmp_path / "full" / "thesis.tex", overwrite=overwrite)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_run_is_overwritten_when_asked_for(folder: RunFolder) -> None:
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    for make in (RunFolder.check, lambda path: RunFolder.create(path, RunSettings())):
        with pytest.raises(
            ValueError,
            match=r"run holds a run already; choose another --output, pass --resume to go on with it, or --overwrite",
        ):
            make(folder.path)
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before
    RunFolder.check(folder.path, overwrite=True)


def test_a_run_is_replaced_once_the_new_one_is_complete(
    folder: RunFolder, net: nn.Module, posterior: GatePosterior, history: History
) -> None:
    """Until then it is left alone; then nothing of it stays, and nothing else goes."""
    folder.save_plots(kind="svg")
    (folder.plots / "mine.txt").write_text("kept")
    (folder.path / "notes.txt").write_text("kept")
    before = {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    for _ in range(2):  # the second time an attempt to replace it was given up
        new = RunFolder.create(folder.path, RunSettings(seed=8), overwrite=True)
        assert new.path == folder.path.with_name("run.new") and [f.name for f in new.path.iterdir()] == [
            "settings.yaml"
        ]
        new.save_network(net, posterior, "map")
    assert {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()} == before
    moved = new.move_to(folder.path)
    left = sorted(str(file.relative_to(folder.path)) for file in folder.path.rglob("*") if file.is_file())
    own = ["bits.json", "notes.txt", "plots/mine.txt", "posterior.safetensors", "settings.yaml", "weights.safetensors"]
    assert left == own and moved.path == folder.path.resolve()
    assert moved.settings().seed == 8 and moved.results() == {}
    assert [file.name for file in folder.path.parent.iterdir()] == ["run"]
    assert moved.move_to(folder.path) == moved


def test_what_lies_beside_a_run_is_not_overwritten(folder: RunFolder) -> None:
    beside = folder.path.with_name("run.new")
    beside.mkdir()
    (beside / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"run\.new is not empty and holds no run"):
        RunFolder.create(folder.path, RunSettings(), overwrite=True)
    assert (beside / "thesis.tex").read_text() == "x"


def test_a_folder_with_half_a_file_is_a_new_one(tmp_path: Path) -> None:
    """The run was killed while it wrote its first file."""
    (tmp_path / ".partial-settings.yaml.x1").write_text("mu")
    folder = RunFolder.create(tmp_path, RunSettings())
    assert [file.name for file in folder.path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_only_runs_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("x")
    with pytest.raises(ValueError, match=r"place holds no run \(no settings\.yaml\); give the --output"):
        RunFolder.open(path)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_network_is_saved_under_float_names_with_posterior_and_bits(
    folder: RunFolder, net: nn.Module, posterior: GatePosterior
) -> None:
    state = net.state_dict()
    saved = load_file(folder.weights_file)
    assert list(saved) == sorted(state) and all(torch.equal(saved[name], state[name]) for name in state)
    assert folder.posterior().map_configuration() == posterior.map_configuration()
    assert BitConfiguration.load(folder.bits_file) == posterior.map_configuration()


def test_posterior_of_a_run_that_has_none(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", RunSettings())
    with pytest.raises(ValueError, match=r"the run in .*run has no posterior: it ended before"):
        folder.posterior()
    with pytest.raises(ValueError, match=r"history\.jsonl is not a training history"):
        folder.history()


def test_results_of_a_run(folder: RunFolder) -> None:
    assert folder.results() == RESULTS
    folder.results_file.unlink()
    assert folder.results() == {}, "the run was interrupted"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"results\.json cannot be read: Expecting"),
        ("[1]", r"results\.json must hold figures by name; got list"),
        ("3", r"results\.json must hold figures by name; got int"),
    ],
)
def test_broken_results_are_refused(folder: RunFolder, content: str, message: str) -> None:
    folder.results_file.write_text(content)
    with pytest.raises(ValueError, match=message):
        folder.results()


@pytest.mark.parametrize("rule", ["map", "threshold"])
def test_export_writes_bits_of_a_rule_and_the_weights(
    tmp_path: Path, folder: RunFolder, net: nn.Module, posterior: GatePosterior, rule: str
) -> None:
    files = folder.export(tmp_path / "new" / "deploy", rule)  # type: ignore[arg-type]
    assert files == [tmp_path / "new" / "deploy" / name for name in ("bits.json", "weights.safetensors")]
    configuration = BitConfiguration.load(files[0])
    assert configuration == posterior.configuration(rule)  # type: ignore[arg-type]
    assert configuration.kept()["0"] == (1 if rule == "map" else 0)
    assert files[1].read_bytes() == folder.weights_file.read_bytes()
    fresh = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    fresh.load_state_dict(load_weights(files[1]))
    x = torch.rand(5, 3)
    torch.testing.assert_close(configuration.apply(fresh)(x), configuration.apply(net)(x), rtol=0, atol=0)


def test_a_run_is_read_on_a_processor_whose_exponential_differs_in_the_last_bit(folder: RunFolder) -> None:
    content = json.loads(folder.bits_file.read_text())
    first = content["tensors"][0]
    trained = torch.tensor(first["beta"])
    for factor, allowed in ((1, True), (1e4, False)):
        first["beta"] = (trained + factor * (torch.nextafter(trained, 2 * trained) - trained)).item()
        folder.bits_file.write_text(json.dumps(content))
        if allowed:
            assert folder.posterior().structure.layout.tensors[0] == first["name"]
        else:
            with pytest.raises(ValueError, match=r"bits\.json does not belong"):
                folder.posterior()


def test_files_of_several_runs_are_not_taken_for_one(
    folder: RunFolder, tmp_path: Path, make_posterior: MakePosterior, history: History
) -> None:
    other = RunFolder.create(tmp_path / "other", RunSettings())
    other.save_network(nn.Linear(2, 2), make_posterior("depthwise"), "map")
    History(("a",), ()).save(other.history_file)
    folder.save_results(RESULTS | {"files": folder.digests()})
    folder.posterior()
    for name in ("posterior.safetensors", "weights.safetensors", "bits.json", "history.jsonl"):
        before = (folder.path / name).read_bytes()
        (folder.path / name).write_bytes((other.path / name).read_bytes())
        for use in (folder.posterior, lambda: folder.export(tmp_path / "deploy", "map"), folder.save_plots):
            with pytest.raises(ValueError, match=r"does not belong to posterior\.safetensors beside it: the"):
                use()
        (folder.path / name).write_bytes(before)
    for name in ("posterior.safetensors", "weights.safetensors", "bits.json"):
        (folder.path / name).write_bytes((other.path / name).read_bytes())
    folder.history_file.unlink()
    with pytest.raises(ValueError, match=r"results\.json does not belong"):
        folder.posterior()
    assert not (tmp_path / "deploy").exists()


def test_export_into_a_file_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "bits.json").write_text("mine")
    with pytest.raises(ValueError, match=r"bits\.json is a file; --output must be a folder"):
        folder.export(tmp_path / "bits.json", "map")
    assert (tmp_path / "bits.json").read_text() == "mine"


def test_report_lists_the_configuration_of_its_rule_only(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(folder, "threshold")
    out = capsys.readouterr().out
    assert f"{folder.bits_file} holds another rule's bits; `bbits export --rule threshold` writes these" in out
    assert f"  {folder.bits_file}" not in out.splitlines() and f"  {folder.weights_file}" in out.splitlines()


def test_export_without_weights_writes_nothing(tmp_path: Path, folder: RunFolder) -> None:
    folder.weights_file.unlink()
    with pytest.raises(ValueError, match=r"the weights .*weights\.safetensors cannot be read"):
        folder.export(tmp_path / "deploy", "map")
    assert not (tmp_path / "deploy").exists()


def test_weights_are_read_back(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"a": torch.rand(3), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("content", [None, b"", b"not tensors at all", b"\x00" * 50])
def test_weights_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the weights .*w\.safetensors cannot be read: "):
        load_weights(path)


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plots_are_saved_in_a_format(tmp_path: Path, folder: RunFolder, kind: str, magic: bytes) -> None:
    target = tmp_path / "figures" if kind == "svg" else None
    files = folder.save_plots(target, kind)
    assert sorted(file.name for file in files) == [f"{name}.{kind}" for name in PLOTS]
    assert {file.parent for file in files} == {target or folder.plots}
    assert all(file.read_bytes().startswith(magic) for file in files)
    assert len(list(files[0].parent.iterdir())) == len(PLOTS), "no temporary file is left"


def test_a_run_without_a_whole_epoch_has_no_training_curves(folder: RunFolder, history: History) -> None:
    History(history.tensors, history.layers).save(folder.history_file)
    assert sorted(file.name for file in folder.save_plots()) == [f"{name}.png" for name in PLOTS if name != "history"]


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but PyTorch sees no GPU; use 'auto' or 'cpu'"):
        pick_device("cuda")


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_shows_table_figures_and_files(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save_plots()
    print_report(folder, "map")
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "Bit configuration (map rule)"
    # 0.76 x 0.6 x 0.9 of 4 bits; 0.54 of 8 bits; 0.49 of 8 bits
    assert "0 4 (0.41) 8 input 1/2 6.00 0.9375" in lines
    assert "2 8 (0.54) 8 (0.49) 2/2* 4.00 1.2500" in lines
    assert "* no channel gates of its own: 2: it feeds the network's output" in lines
    low, high = folder.posterior().bops_interval()
    expected = folder.posterior().expected_bops()
    drawn = f"94 % of drawn configurations {low:.3f} to {high:.3f} %"
    assert f"relative BOPs 2.188 % (expected {expected:.3f} %, {drawn})" in lines
    assert "test accuracy full precision 97.50 % (20 samples)" in lines
    assert "test accuracy quantized 91.25 % (20 samples, map rule)" in lines
    assert lines[-7:] == [
        str(folder.path / file)
        for file in ("bits.json", "weights.safetensors", *(f"plots/{name}.png" for name in PLOTS))
    ]


def test_report_under_another_rule_says_whose_accuracy_it_is(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(folder, "threshold")
    out = " ".join(capsys.readouterr().out.split())
    assert "Bit configuration (threshold rule)" in out and "relative BOPs 0.000 %" in out
    assert "0 0 (0.24) 8 input 0/2" in out
    assert "91.25 % (20 samples, map rule)" in out
    folder.save_results(RESULTS | {"rule": "threshold"})
    print_report(folder, "map")
    assert "91.25 % (20 samples, threshold rule)" in " ".join(capsys.readouterr().out.split())


def test_report_of_an_interrupted_run(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.results_file.unlink()
    print_report(folder, "map")
    assert "this run did not come to its end: there are no test figures" in capsys.readouterr().out


def test_report_of_a_run_without_baseline(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save_results(RESULTS | {"test_accuracy_float": None})
    print_report(folder, "map")
    out = capsys.readouterr().out
    assert "full precision" not in out and "91.25 %" in out


def test_report_of_a_regression(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save_results({"test_samples": 20, "rule": "map", "test_rmse_float": 54.7185, "test_rmse": 1234567.8})
    print_report(folder, "map")
    out = " ".join(capsys.readouterr().out.split())
    assert "test RMSE full precision 54.718 (20 samples)" in out and "accuracy" not in out
    assert "test RMSE quantized 1.2346e+06 (20 samples, map rule)" in out


def test_report_cuts_neither_names_nor_figures(
    tmp_path: Path, make_posterior: MakePosterior, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a narrow terminal, in a folder whose name looks like markup."""
    monkeypatch.setenv("COLUMNS", "30")
    folder = RunFolder.create(tmp_path / "run[red]:smile:", RunSettings())
    posterior = make_posterior("deep")
    folder.save_network(nn.Linear(1, 1), posterior, "map")
    print_report(folder, "map")
    out = capsys.readouterr().out
    for name, row in posterior.table().iterrows():
        (line,) = (line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert line[-1] == f"{row['relative_bops']:.4f}" and line[1] == str(row["weight_bits"])
    assert str(folder.bits_file) in out


def test_table_has_a_row_per_layer(make_posterior: MakePosterior) -> None:
    assert layer_table(make_posterior("depthwise")).row_count == 4


def test_results_are_json(folder: RunFolder) -> None:
    assert json.loads(folder.results_file.read_text(encoding="utf-8")) == RESULTS


def test_the_table_of_any_network_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    """An embedding reads indices, products have no channels, and what stays in float is told."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.attention = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, words: Tensor) -> Tensor:
            x = self.token(words)
            logits: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
            return logits

    network = quantize(Words(), torch.randint(9, (6, 5)), exclude="head")
    guide = HardConcreteGuide(GatePrior(network, 0.1))
    print_configuration(GatePosterior.from_guide(guide, network))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "token 32 (1.00) indices 4/4 0.00 0.0000" in lines
    assert any(line.startswith("attention.matmul0 32 (1.00) 32 (1.00) 100.00 ") for line in lines)
    start = lines.index("1.52 % of the multiplications stay in float, counted at 32 x 32 bit:")
    assert lines[start + 1] == "head (Linear): excluded by 'head'"


def test_a_complete_run_beside_is_not_lost(folder: RunFolder) -> None:
    """`--overwrite` trains in RUN.new; what was finished there by --resume, or by chance has the name, stays."""
    folder.save_results({"seed": 0})
    beside = RunFolder.create(folder.path, RunSettings(), overwrite=True)
    beside.save_results({"seed": 1})
    with pytest.raises(ValueError, match=r"\.new holds a complete run that would be lost"):
        RunFolder.check(folder.path, overwrite=True)
    assert beside.finished


def test_export_into_a_run_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="holds a run; choose another --output"):
        folder.export(folder.path, "threshold")
