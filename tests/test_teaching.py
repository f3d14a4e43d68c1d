"""The pages for teachers (notebooks/teaching) name sections and exercises that exist, and their plans add up."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TEACHING = NOTEBOOKS / "teaching"
CHAPTERS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
PAGES = sorted(TEACHING.glob("*.md"))
LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")
EXERCISE = re.compile(r"[Ee]xercise (\d+), \*([^*]+)\* \((\d+) minutes\)")
ROW = re.compile(r"^\| (\d+):(\d\d) \| (\d+) \| (.+?) \|", re.MULTILINE)


def cells(chapter):
    return json.loads(chapter.read_text(encoding="utf-8"))["cells"]


def markdown(chapter):
    return "\n".join("".join(cell["source"]) for cell in cells(chapter) if cell["cell_type"] == "markdown")


def headings(chapter):
    """Headings by the anchor that Jupyter gives them."""
    found = re.findall(r"^#{1,4} (.+)$", markdown(chapter), re.MULTILINE)
    return {heading.replace("`", "").replace(" ", "-"): heading for heading in found}


def exercises(chapter):
    """(number, name, minutes) of a chapter's exercise cards."""
    return set(re.findall(r"^\*\*(\d+) · (.+?)\*\* \((\d+) minutes", markdown(chapter), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_to_sections_of_this_name(page):
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        path = page.parent / file
        assert path.exists(), target
        assert not anchor or headings(path).get(unquote(anchor)) == text, f"{text}: no such section in {path.name}"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
class TestChapter:
    def test_its_page_has_all_parts(self, chapter):
        page = (TEACHING / f"{chapter.stem}.md").read_text(encoding="utf-8")
        parts = {part.splitlines()[0]: part for part in page.split("\n## ")[1:]}
        assert list(parts) == ["Ask", "Three misconceptions", "Show", "Replay"]
        assert len(re.findall(r"^- \*.+\?\*", parts["Ask"], re.MULTILINE)) >= 3
        assert re.findall(r"^(\d)\. \*\*\"", parts["Three misconceptions"], re.MULTILINE) == ["1", "2", "3"]
        assert "Without a GPU" in parts["Show"] and "On one GPU" in parts["Show"]
        assert f"({chapter.stem}.md)" in (TEACHING / "README.md").read_text(encoding="utf-8")

    def test_its_page_names_exercises_and_core_functions_that_it_has(self, chapter):
        page = (TEACHING / f"{chapter.stem}.md").read_text(encoding="utf-8")
        assert set(EXERCISE.findall(page)) <= exercises(chapter)
        blanks = {name for cell in cells(chapter) for name in cell["metadata"].get("practice", {}).get("blank", [])}
        for names in re.findall(r"practice edition \(([^)]+)\)", page):
            assert set(re.findall(r"`([^`]+)`", names)) <= blanks


@pytest.mark.parametrize(
    "plan", (TEACHING / "plans.md").read_text(encoding="utf-8").split("\n## ")[1:], ids=lambda plan: plan.split(":")[0]
)
def test_a_plan_adds_up_and_its_exercises_are_on_their_cards(plan):
    clock = 0
    for hours, minutes, length, what in ROW.findall(plan):
        assert 60 * int(hours) + int(minutes) == clock
        clock += int(length)
        if what.startswith("Exercises"):
            chapter = re.match(r"Exercises of (\d\d): ", what)[1]
            named = EXERCISE.findall(what)
            assert set(named) <= exercises(next(NOTEBOOKS.glob(f"{chapter}_*.ipynb")))
            assert sum(int(card[2]) for card in named) == int(length)
    assert f": {clock} minutes\n" in plan
