import pytest

from meam_policy.console import print_mapping, print_table

VARIANTS = ("best-of-4", "k10-midpoint-rtc", "midpoint")
FIGURES = ("6.04e-08", "0.00123", "-1.23e+03", "0.953", "0.0123", "0.0456")
COLUMNS = ("variant", "K", "solver", "error", "W1", "return", "success", "p50 ms", "p99 ms")


def cells(output):
    return [tuple(cell.strip() for cell in line.split("│")) for line in output.splitlines() if "│" in line]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_words_and_numbers_stay_whole_at_any_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [(name, "10", "midpoint", *FIGURES) for name in VARIANTS]
    print_table("Variants", COLUMNS, rows)
    assert cells(capsys.readouterr().out) == rows


def test_a_ladder_with_every_figure_fits_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table("Variants", COLUMNS, [(name, "10", "midpoint", *FIGURES) for name in VARIANTS])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_long_text_is_folded_to_the_width_of_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_mapping("policy", {"policy": "/folder" * 40, "seed": 0})
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert "".join(row[1] for row in cells(output)) == "/folder" * 40 + "0"
