"""Settings come from flags, a file or defaults, in this order, and a wrong one is named in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pyro_bbits.settings import RunSettings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("mu: 0.5\nepochs: 7\nbits: [2, 4]\nprune: false\n")
    return path


def test_flags_win_over_yaml_and_yaml_over_defaults(config: Path) -> None:
    settings = RunSettings.make({"mu": 0.25, "seed": None, "epochs": None}, config)
    assert settings.mu == 0.25, "a flag wins"
    assert (settings.epochs, settings.bits, settings.prune) == (7, (2, 4), False), "None is no flag"
    assert settings.seed == RunSettings().seed == 0, "the rest are defaults"


@pytest.mark.parametrize(("flag", "expected"), [(True, True), (False, False), (None, False)])
def test_a_switch_can_be_given_both_ways(config: Path, flag: bool | None, expected: bool) -> None:
    assert RunSettings.make({"prune": flag}, config).prune is expected


def test_zero_is_a_value(config: Path) -> None:
    assert RunSettings.make({"mu": 0.0, "fine_tune_epochs": 0}, config).mu == 0


@pytest.mark.parametrize("bits", ["2,4,8", " 2, 4 ,8", [2, 4, 8], (2, 4, 8), ["2", "4", "8"]])
def test_bits_come_as_text_or_list(tmp_path: Path, bits: Any) -> None:
    assert RunSettings.make({"bits": bits}).bits == (2, 4, 8)
    if not isinstance(bits, tuple):
        (tmp_path / "bits.yaml").write_text(yaml.safe_dump({"bits": bits}))
        assert RunSettings.load(tmp_path / "bits.yaml").bits == (2, 4, 8)


def test_one_width_is_a_ladder() -> None:
    assert RunSettings.make({"bits": "8"}).bits == (8,)


@pytest.mark.parametrize(
    ("data", "epochs", "batch_size"),
    [("digits", 40, 64), ("mnist", 20, 128), ("cifar10", 100, 128), ("own.csv", 20, 128)],
)
def test_epochs_and_batches_follow_the_data(data: Any, epochs: int, batch_size: int) -> None:
    settings = RunSettings(data=data)
    assert (settings.resolved_epochs, settings.resolved_batch_size) == (epochs, batch_size)
    given = RunSettings(data=data, epochs=3, batch_size=5)
    assert (given.resolved_epochs, given.resolved_batch_size) == (3, 5)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"mu": -1}, r"^mu: .*greater than or equal to 0; got -1\.$"),
    ({"mu": float("nan")}, r"^mu: .*finite number; got nan\.$"),
    ({"mu": float("inf")}, r"^mu: .*finite number; got inf\.$"),
    ({"mu": "much"}, r"^mu: .*valid number.*; got 'much'\.$"),
    ({"bits": "2,3"}, r"^bits: each bit width must be a multiple.*got \(2, 3\), where 3 is not a multiple of 2\.$"),
    ({"bits": "8,4"}, r"^bits: bit widths must increase.*got \(8, 4\)\.$"),
    ({"bits": "1,2"}, r"^bits: bit widths must lie between 2 and 32.*got \(1, 2\)\.$"),
    ({"bits": []}, r"^bits: bit widths must lie between 2 and 32.*got \(\)\.$"),
    ({"bits": "2,four"}, r"^bits\.1: .*valid integer.*; got 'four'\.$"),
    ({"bits": ""}, r"^bits: give at least one width, such as 2,4,8\.$"),
    ({"bits": 4}, r"^bits: .*tuple; got 4\.$"),
    ({"epochs": 0}, r"^epochs: .*greater than or equal to 1; got 0\.$"),
    ({"epochs": 1.5}, r"^epochs: .*; got 1\.5\.$"),
    ({"fine_tune_epochs": -1}, r"^fine_tune_epochs: .*got -1\.$"),
    ({"batch_size": 0}, r"^batch_size: .*got 0\.$"),
    ({"weight_lr": 0}, r"^weight_lr: .*greater than 0; got 0\.$"),
    ({"gate_lr": -0.1}, r"^gate_lr: .*greater than 0; got -0\.1\.$"),
    ({"range_lr": float("inf")}, r"^range_lr: .*finite number; got inf\.$"),
    ({"init_logit": float("nan")}, r"^init_logit: .*finite number; got nan\.$"),
    ({"seed": -1}, r"^seed: .*got -1\.$"),
    ({"seed": 2**32}, r"^seed: .*less than 4294967296; got 4294967296\.$"),
    ({"threads": 0}, r"^threads: .*got 0\.$"),
    ({"prune": "perhaps"}, r"^prune: .*boolean.*; got 'perhaps'\.$"),
    ({"data": ""}, r"^data: .*at least 1 character; got ''\.$"),
    ({"task": "ranking"}, r"^task: .*'classification' or 'regression'; got 'ranking'\.$"),
    ({"augment": "mixup"}, r"^augment: .*'none', 'crop', 'crop-flip' or 'crop-flip-cutout'; got 'mixup'\.$"),
    ({"bad_images": "mend"}, r"^bad_images: .*'raise' or 'skip'; got 'mend'\.$"),
    ({"image_size": 0}, r"^image_size: .*got 0\.$"),
    ({"workers": -1}, r"^workers: .*got -1\.$"),
    ({"guide": "normal"}, r"^guide: .*'hard-concrete' or 'straight-through'; got 'normal'\.$"),
    ({"cost": "money"}, r"^cost: .*'bops' or 'constant'; got 'money'\.$"),
    ({"rule": "mean"}, r"^rule: .*'map' or 'threshold'; got 'mean'\.$"),
    ({"device": "tpu"}, r"^device: .*'auto', 'cpu' or 'cuda'; got 'tpu'\.$"),
    ({"pin": "fc1"}, r"^pin: a pin is PATTERN=BITS, such as \*\.input=8; got 'fc1'\.$"),
    ({"pin": 8}, r"^pin: a pin is PATTERN=BITS, .*; got '8'\.$"),
    ({"pin": [8]}, r"^pin: a pin is PATTERN=BITS, .*; got '8'\.$"),
    ({"pin": "fc1=all"}, r"^pin: a pin is PATTERN=BITS, .*; got 'fc1=all'\.$"),
    ({"ranges": "mean"}, r"^ranges: .*'max' or 'mse'; got 'mean'\.$"),
    ({"schedule": "linear"}, r"^schedule: .*'steps' or 'constant'; got 'linear'\.$"),
    ({"start": "zero"}, r"^start: .*'initial' or 'float'; got 'zero'\.$"),
    ({"distill": 1.5}, r"^distill: .*less than or equal to 1; got 1\.5\.$"),
    ({"bops_price": -1}, r"^bops_price: .*greater than or equal to 0; got -1\.$"),
    ({"data_path": "x"}, r"^the digits data ship with scikit-learn and take no data_path\.$"),
    ({"learning_rate": 0.1}, r"^there is no setting 'learning_rate'; the settings are data, .*weight_lr, .*threads\.$"),
    ({"batch-size": 4}, r"^there is no setting 'batch-size' \(did you mean 'batch_size'\?\); the settings are data, "),
    ({"mu": True}, r"^mu: must not be true, which YAML also reads from yes, no, on and off\.$"),
    ({"epochs": False}, r"^epochs: must not be false, which YAML also reads from yes"),
]


@pytest.mark.parametrize(("values", "message"), ERRORS, ids=lambda value: str(value)[:20])
def test_a_wrong_setting_is_named_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RunSettings.make(values)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [pair for pair in ERRORS if "range_lr" not in pair[0] and pair[0].get("mu") != float("inf")],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_setting_in_a_file_is_named_as_well(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    """After the name of the file."""
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=rf"^.*wrong\.yaml: {message[1:]}"):
        RunSettings.load(tmp_path / "wrong.yaml")


def test_a_wrong_flag_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "right.yaml").write_text("mu: 0.5\nprune: yes\n")
    with pytest.raises(ValueError, match=r"^mu: .*got -1"):
        RunSettings.make({"mu": -1}, tmp_path / "right.yaml")
    assert RunSettings.load(tmp_path / "right.yaml").prune


@pytest.mark.parametrize(
    ("given", "expected"), [({}, None), ({"mu": 0.5, "seed": 3}, None), ({"threads": 2, "device": "cpu"}, 2)]
)
def test_a_run_goes_on_with_its_settings(tmp_path: Path, given: dict[str, Any], expected: int | None) -> None:
    """Where it runs may change; what is trained may not."""
    path, started = tmp_path / "settings.yaml", RunSettings(mu=0.5, seed=3)
    started.save(path)
    resumed = RunSettings.resumed(path, given)
    assert resumed.threads == expected
    assert resumed.model_copy(update={"threads": None, "device": "auto"}) == started


@pytest.mark.parametrize(("name", "value"), [("mu", 0.4), ("epochs", 3), ("bits", "2,4"), ("seed", 1)])
def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "settings.yaml"
    RunSettings(mu=0.5).save(path)
    with pytest.raises(ValueError, match=rf"^the run was started with {name} .*, and goes on with that; got "):
        RunSettings.resumed(path, {name: value})
    (tmp_path / "config.yaml").write_text(f"{name}: {value}")
    with pytest.raises(ValueError, match=rf"^the run was started with {name} "):
        RunSettings.resumed(path, {}, tmp_path / "config.yaml")


def test_a_right_flag_mends_a_wrong_file(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("mu: -1\n")
    assert RunSettings.make({"mu": 0.5}, tmp_path / "wrong.yaml").mu == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mu: [1", r"settings\.yaml is not valid YAML: .*line"),
        ("mu: 1\n  seed: 2\n", r"settings\.yaml is not valid YAML: "),
        ("- mu\n- 0.1\n", r"settings\.yaml must hold settings by name, e.g. 'mu: 0.1'; got list"),
        ("0.1", r"settings\.yaml must hold settings by name, e.g. 'mu: 0.1'; got float"),
        ("", r"settings\.yaml is empty; it must hold settings by name, e.g. 'mu: 0.1'"),
        ("# mu: 1", r"settings\.yaml is empty"),
        ("1: 2", r"settings\.yaml must hold settings by name"),
    ],
)
def test_files_without_settings_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        RunSettings.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the settings .*none\.yaml cannot be read: .*No such file"):
        RunSettings.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"the settings .* cannot be read: .*directory"):
        RunSettings.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"the settings .*binary\.yaml cannot be read: "):
        RunSettings.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "settings",
    [
        RunSettings(),
        RunSettings(
            data="mnist",
            data_path=Path("data/größe"),
            target="größe",
            task="regression",
            image_size=64,
            bad_images="skip",
            augment="none",
            workers=0,
            network="lenet5",
            pretrained=Path("float.safetensors"),
            bits=(4, 8),
            mu=1e-5,
            cost="constant",
            simplified=True,
            guide="straight-through",
            bops_price=0.5,
            prune=False,
            pin=("*.input=8",),
            ranges="mse",
            init_logit=-2.5,
            rule="threshold",
            epochs=3,
            fine_tune_epochs=2,
            schedule="cosine",
            batch_size=16,
            weight_lr=3e-4,
            gate_lr=0.02,
            range_lr=1e-7,
            baseline=False,
            seed=2**32 - 1,
            device="cpu",
            threads=2,
        ),
    ],
)
def test_settings_survive_a_file(tmp_path: Path, settings: RunSettings) -> None:
    path = tmp_path / "new" / "settings.yaml"
    settings.save(path)
    assert RunSettings.load(path) == settings
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == list(RunSettings.model_fields), "all are written"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunSettings().mu = 3.0  # type: ignore[misc]


@pytest.mark.parametrize("value", ["conv1, fc.*", ["conv1", "fc.*"], ["conv1,fc.*"]])
def test_patterns_come_as_text_or_list(value: Any) -> None:
    settings = RunSettings.make({"exclude": value, "include": "body"})
    assert (settings.include, settings.exclude) == (("body",), ("conv1", "fc.*"))


PINS = ["*.input=8, fc=1.weight=4", ["*.input=8", "fc=1.weight = 4"], {"*.input": 8, "fc=1.weight": 4}]


@pytest.mark.parametrize("value", PINS, ids=str)
def test_pins_come_as_text_or_list(value: Any) -> None:
    assert RunSettings.make({"pin": value}).pins == (("*.input", 8), ("fc=1.weight", 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pretrained_head": "reset"}, "pretrained_head goes with pretrained weights"),
        ({"start": "float", "baseline": False}, "start float and float_epochs need the full-precision network"),
        ({"float_epochs": 3, "baseline": False}, "start float and float_epochs need the full-precision network"),
        ({"distill": 0.5, "baseline": False}, "distill needs a float network to learn from"),
        (
            {"distill": 0.5, "baseline": False, "pretrained": "x.pth", "pretrained_head": "reset"},
            "distill would learn from a head with random weights",
        ),
        ({"bops_price": 1, "mu": 0}, "bops_price needs a mu above 0, such as 1e-6"),
        ({"distill": 0.5, "task": "regression"}, "distill is for classes; the task is regression"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSettings.make(values)


def test_a_run_goes_on_with_a_picture_cache_anywhere_or_with_none(tmp_path: Path) -> None:
    for name, cache in (("with.yaml", tmp_path / "one"), ("without.yaml", None)):
        RunSettings(data="pictures", image_size=8, picture_cache=cache).save(tmp_path / name)
    moved = RunSettings.resumed(tmp_path / "with.yaml", {"picture_cache": tmp_path / "two"})
    assert moved.picture_cache == tmp_path / "two"
    with pytest.raises(ValueError, match="goes on with a picture cache, or without one, as it was started"):
        RunSettings.resumed(tmp_path / "without.yaml", {"picture_cache": tmp_path / "two"})
