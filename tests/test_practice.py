"""The practice edition is the worked edition with blanks: filled in, both have the same code."""

import json
from pathlib import Path

import pytest

from helpers.errors import UserError
from helpers.exercises.practice import blank, fill, practice_edition
from helpers.notebooks import NOTEBOOKS, find_chapters, source

CHAPTERS = find_chapters(NOTEBOOKS)
CELL = '''def first(x):
    """What it does."""
    y = x + 1
    return y


class Both:
    def second(self):
        return 2


judge(first)
'''


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_bodies_are_blank_and_the_rest_stays():
    practised = blank(CELL, ["first", "Both.second"])
    yours = 'raise NotImplementedError("yours: write the body of {} and run its cell again")\n'
    assert '    """What it does."""\n    ' + yours.format("first") + "\n" in practised
    assert "    def second(self):\n        " + yours.format("Both.second") in practised
    assert practised.endswith("judge(first)\n") and "y = x" not in practised
    assert fill(practised, CELL, ["first", "Both.second"]) == CELL


def test_a_program_that_a_cell_writes_is_blank_as_well():
    practised = blank(f"%%writefile {{FILE}}\n{CELL}", ["first"])
    assert practised.startswith("%%writefile {FILE}\ndef first") and "y = x" not in practised
    assert fill(practised, f"%%writefile {{FILE}}\n{CELL}", ["first"]) == f"%%writefile {{FILE}}\n{CELL}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_filled_in_it_is_the_worked_edition(path):
    worked = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    edition = practice_edition(read(path), path.name)
    practised = [cell for cell in edition["cells"] if cell["cell_type"] == "code" and cell["id"] != "practice-setup"]
    assert len(practised) == len(worked)
    for mine, original in zip(practised, worked, strict=True):
        wanted = original["metadata"].get("practice", {"blank": []})
        assert fill(source(mine), source(original), wanted["blank"]) == source(original)
        assert not wanted["blank"] or (source(mine) != source(original) and not mine["outputs"])
    text = json.dumps(edition["cells"])
    assert "Solution</summary>" not in text and "practice-setup" in text


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_blank_has_three_hints_and_a_judge(path):
    code = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code):
        if wanted := cell["metadata"].get("practice"):
            judging = next(cell for cell in code[number:] if not source(cell).startswith("%%"))
            assert len(wanted["hints"]) == 3 and source(judging).splitlines()[-1].startswith("chapter_")


def test_outputs_stay_and_say_where_they_come_from():
    edition = practice_edition(read(CHAPTERS[2]), CHAPTERS[2].name)
    outputs = [cell["outputs"] for cell in edition["cells"] if cell["cell_type"] == "code" and cell["outputs"]]
    assert all(first["data"]["text/markdown"].startswith("*recorded on ") for first, *_ in outputs)


def test_a_wrong_name_is_found():
    notebook = read(CHAPTERS[2])
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["metadata"]["practice"] = {"blank": ["nowhere"], "hints": []}
    with pytest.raises(UserError, match=f"cell {code['id']}: it does not define nowhere"):
        practice_edition(notebook, "x.ipynb")
