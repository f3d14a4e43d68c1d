"""What every notebook owes its reader, checked on the committed files. That they run is nbval's part (`make test`)."""

import json
import re
from pathlib import Path
from statistics import median

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Words that begin a path on one machine; a reader's machine has others.
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|opt|mnt|srv|Users)/\w")
CARD = re.compile(r"\(\d+ minutes, (?:easy|medium|hard), (?:core|optional)\)")  # of an exercise
LINK = re.compile(r"\]\(([^)#:]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def cells(path: Path, kind: str) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_was_executed_from_top_to_bottom_without_an_error(self, path):
        code = cells(path, "code")
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]

    def test_no_two_cells_have_the_same_id(self, path):  # outputs are carried over by id
        ids = [cell["id"] for kind in ("code", "markdown") for cell in cells(path, kind)]
        assert len(ids) == len(set(ids))

    def test_its_cells_are_short_and_few(self, path):
        lengths = [len(source(cell).splitlines()) for cell in cells(path, "code")]
        assert len(lengths) <= 60 and max(lengths) <= 30 and median(lengths) <= 8

    def test_its_outputs_are_small_portable_and_show_figures(self, path):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 1_000_000
        assert not LOCAL_PATH.search(text)
        assert "application/javascript" not in text and "image/png" in text

    def test_some_of_its_outputs_are_compared(self, path):
        marked = [cell for cell in cells(path, "code") if "NBVAL_CHECK_OUTPUT" in source(cell)]
        assert marked and all(cell["outputs"] for cell in marked)

    def test_it_says_what_the_reader_gets_and_ends_with_exercises_and_references(self, path):
        texts = [source(cell) for cell in cells(path, "markdown")]
        for promise in ("You will be able to", "You need", "Time"):
            assert promise in texts[0]
        assert sum(text.count("<summary>Solution</summary>") for text in texts) >= 3
        assert any(text.startswith("## References") or "\n## References" in text for text in texts)

    def test_its_exercises_have_cards_and_judges(self, path):
        every = json.loads(path.read_text(encoding="utf-8"))["cells"]
        last = every[next(i for i, cell in enumerate(every) if "## Exercises\n" in source(cell)) :]
        _, _, text = "\n".join(source(cell) for cell in last).partition("## Exercises\n")
        cards = re.findall(r"^\*\*(\d+) · .+?\*\* (\(.+?\))", text, re.MULTILINE)
        assert cards and [int(number) for number, _ in cards] == list(range(1, len(cards) + 1))
        assert not [card for _, card in cards if not CARD.fullmatch(card)]
        assert len(re.findall(rf"^chapter_{path.stem[:2]}\.\w+\(", text, re.MULTILINE)) == len(cards)

    def test_it_has_one_title(self, path):
        texts = [CODE_BLOCK.sub("", source(cell)) for cell in cells(path, "markdown")]
        assert len(re.findall(r"^# ", "\n".join(texts), re.MULTILINE)) == 1  # the website makes a page of each

    def test_its_links_lead_somewhere(self, path):
        targets = {target for cell in cells(path, "markdown") for target in LINK.findall(source(cell))}
        assert not [target for target in targets if not (path.parent / target).exists()]
