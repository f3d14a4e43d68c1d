"""A guess is shown beside its measurement, is silent without a number, and stops no notebook."""

import ast
import json
from pathlib import Path

import pytest

from helpers.errors import UserError
from helpers.exercises.guess import guess

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHAPTERS = [path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")) if "01" <= path.name[:2] <= "12"]


@pytest.mark.parametrize(
    "quantity, measured, line",
    [
        ({"gib": 80}, 102.04, "your guess 80 GiB, measured 102 GiB: the guess is 0.784 times the measurement"),
        ({"bytes": 2e6}, 1_234_567, "your guess 2,000,000 bytes, measured 1,234,567 bytes: the guess is 1.62 times"),
        ({"idle": 0.5}, 3 / 11, "your guess 50 %, measured 27.3 %: the guess is 1.83 times the measurement"),
        ({"times": 2}, 0.0, "your guess 2 times, measured 0 times\n"),
        ({"seconds": 0}, None, "your guess 0 s; this machine cannot measure it\n"),
    ],
)
def test_a_guess_stands_beside_the_measurement(quantity, measured, line, capsys):
    guess(**quantity).compare(measured)
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.count("\n") == 1


def test_without_a_guess_nothing_is_printed(capsys):
    guess(gib=None).compare(3.0)
    guess(idle=None).compare(None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", ["80 GiB", True, -1, float("nan"), float("inf"), [3]])
def test_what_is_no_number_is_named_and_not_compared(value, capsys):
    guess(gib=value).compare(3.0)
    assert capsys.readouterr().out == f"gib={value!r} is not compared: a guess is a number of 0 or more\n"


def test_a_share_in_percent_is_named(capsys):
    guess(idle=30).compare(0.3)
    assert capsys.readouterr().out == "idle=30 is not compared: a guess is a number from 0 to 1 (0.3 is 30 %)\n"


@pytest.mark.parametrize("quantity", [{}, {"tons": 3}, {"gib": 1, "bytes": 2}])
def test_another_quantity_is_refused(quantity):
    with pytest.raises(UserError, match="write one of bytes, gib"):
        guess(**quantity)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_asks_for_a_guess_and_shows_it(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    asked, shown = (
        [number for number, cell in enumerate(cells) if text in "".join(cell["source"])]
        for text in ("guessed = guess(", "guessed.compare(")
    )
    assert 1 <= len(asked) == len(shown) <= 2
    assert all(before < after for before, after in zip(asked, shown, strict=True))
    for number in asked + shown:
        assert cells[number]["outputs"] == [], "nobody has guessed in the worked edition"
    for number in asked:
        call = ast.parse("".join(cells[number]["source"])).body[-1].value
        assert [keyword.value.value for keyword in call.keywords] == [None]
