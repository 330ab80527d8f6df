"""What a run prints."""

import pytest

from pyro_bbits.inference import EpochRecord
from pyro_bbits.inference.progress import describe_epoch, report_progress


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (EpochRecord(1, 0.5), "loss  0.5000"),
        (EpochRecord(1, 0.5, validation_nll=0.25), "loss  0.5000  held-out nll  0.2500"),
        (
            EpochRecord(1, 0.5, validation_nll=0.25, validation_accuracy=97.5),
            "loss  0.5000  held-out accuracy  97.50 %",
        ),
        (
            EpochRecord(1, 12.5, expected_bops=3.5, bits=(4, 2, 4, 0)),
            "loss 12.5000  E[BOPs]  3.500 %  bits 0b x1 2b x1 4b x2",
        ),
    ],
)
def test_an_epoch_is_described_by_what_is_known(record: EpochRecord, expected: str) -> None:
    assert describe_epoch(record) == expected


def lines(epochs: int, enabled: bool) -> None:
    with report_progress(epochs, 2, enabled, "digits") as report:
        for epoch in range(1, epochs + 1):
            report(None, 0.5)
            report(None, 0.5)
            report(EpochRecord(epoch, 0.5), 0.5)


def test_every_epoch_of_a_short_run_leaves_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines(3, enabled=True)
    expected = [f"digits    {epoch}/3  loss  0.5000" for epoch in (1, 2, 3)]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_long_run_leaves_about_twenty_lines_the_first_and_last_among_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines(101, enabled=True)
    epochs = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert epochs == [1, *range(5, 101, 5), 101]


def test_a_silent_run_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    lines(3, enabled=False)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
