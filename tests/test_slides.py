"""helpers.slides: what a deck shows of a notebook, where it breaks, and that its page needs no network."""

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jupyter_core.paths import jupyter_path

from helpers.errors import UserError
from helpers.slides.deck import HEIGHT, MOST_CODE, make_deck
from helpers.slides.formulas import draw_formulas
from helpers.slides.page import write_page

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def markdown(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(lines, *outputs):
    text = "\n".join(f"x = {number}" for number in range(lines))
    return {"cell_type": "code", "metadata": {}, "execution_count": 1, "source": text, "outputs": list(outputs)}


def printed(lines, name="stdout"):
    return {"output_type": "stream", "name": name, "text": "\n".join(f"line {number}" for number in range(lines))}


def drawn(width, height):
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)
    png = base64.b64encode(header).decode()
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": png, "text/plain": "<Figure>"}}


FIGURE = drawn(990, 528)


def deck(*cells):
    return make_deck({"cells": list(cells)})


def texts(slide):
    return [cell["source"] for cell in slide.cells]


class TestDeck:
    def test_a_heading_starts_a_slide_and_the_first_paragraph_stays(self):
        first, second = deck(markdown("# A\n\nShown.\n\nNot shown.\n\n| a | b |\n|---|---|\n\n## B\nNext."))
        assert (first.title, texts(first), first.notes) == ("A", ["Shown.", "| a | b |\n|---|---|"], ["Not shown."])
        assert (second.title, texts(second)) == ("B", ["Next."])

    def test_figures_and_short_code_stay_and_long_code_goes(self):
        (slide,) = deck(markdown("# A"), code(3, FIGURE), code(MOST_CODE + 1), code(MOST_CODE + 1, printed(1)))
        figure, only_output = slide.cells
        assert not figure["metadata"]["transient"]["remove_source"] and "image/png" in figure["outputs"][0]["data"]
        assert only_output["metadata"]["transient"]["remove_source"] and only_output["outputs"][0]["text"] == "line 0"

    def test_a_tall_figure_gets_a_slide_of_its_own_and_a_flat_one_keeps_its_code(self):
        text = markdown("# A\n\n" + "A paragraph. " * 20)
        first, second = deck(text, code(9, drawn(1430, 800)))
        assert len(first.cells) == len(second.cells) == 1 and second.figure_room == HEIGHT
        assert second.cells[0]["metadata"]["transient"]["remove_source"]
        (both,) = deck(text, code(9, drawn(1430, 300)))
        assert len(both.cells) == 2 and not both.cells[1]["metadata"]["transient"]["remove_source"]
        assert both.figure_room == HEIGHT - 4 - 10  # without the lines of the paragraph and of the code

    def test_long_output_is_cut_and_stderr_is_left_out(self):
        (slide,) = deck(markdown("# A"), code(1, printed(99), printed(5, "stderr")))
        (output,) = slide.cells[0]["outputs"]
        assert output["text"].endswith("…") and len(output["text"].splitlines()) < 20

    def test_what_no_longer_fits_goes_to_a_slide_of_the_same_title(self):
        slides = deck(markdown("# A"), *[code(1, FIGURE)] * 3)
        assert [slide.title for slide in slides] == ["A"] * 3

    def test_exercises_come_without_solutions_and_references_not_at_all(self):
        solution = "<details><summary>Solution</summary>\n\n`7`\n</details>"
        text = f"## Exercises\n\n**1 · Count** (5 minutes). How many?\n\n{solution}"
        slides = deck(markdown("# A"), markdown(text), code(2, printed(1)), markdown("## References\n\n- Paper"))
        assert [slide.title for slide in slides] == ["A", "Exercises", "Exercise 1 · Count"]
        assert texts(slides[-1]) == ["(5 minutes). How many?"]


class Page(HTMLParser):
    """What a browser would load, and which elements are open at the end."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.open, self.sections, self.figures = [], [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [found[name] for name in ("src", "data") if name in found]
        self.loaded += [found["href"]] if tag == "link" else []
        self.sections += tag == "section"
        self.figures += str(found.get("src")).startswith("data:image/png")
        if tag in ("section", "aside"):
            assert tag not in self.open
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("section", "aside"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_a_deck(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    slides = make_deck(notebook)
    assert not [slide.title for slide in slides if slide.height > HEIGHT and len(slide.cells) > 1]
    assert not re.search(r"</?details>|nbval", repr(slides), re.IGNORECASE)
    # Formulas, those of the notes included: drawing them shows that they can be drawn.
    for slide in slides:
        for text in (slide.title, *slide.notes, *(cell["source"] for cell in slide.cells if "outputs" not in cell)):
            draw_formulas(text)


def test_a_page_loads_nothing_and_shows_all_slides_and_figures():
    if not any((Path(folder) / "basic").exists() for folder in jupyter_path("nbconvert", "templates")):
        pytest.skip("a page is written with a template of nbconvert, which is not installed here")
    path = NOTEBOOKS[0]
    slides = make_deck(json.loads(path.read_text(encoding="utf-8")))[:24]
    text = write_page("title & more", slides, path.parent)
    page = Page(text)
    assert page.sections == len(slides) and not page.open
    outputs = [output for slide in slides for cell in slide.cells for output in cell.get("outputs", [])]
    assert page.figures == sum("image/png" in output.get("data", {}) for output in outputs) > 2
    assert all(address.startswith("data:") for address in page.loaded)
    assert not re.search(r"@import|url\(|fetch\(|<script[^>]+src", text)
    assert "<title>title &amp; more</title>" in text and "In&nbsp;[" not in text


def test_dollars_in_code_are_no_formulas_and_an_unknown_command_is_named():
    assert draw_formulas("`$a$` and\n```\n$b$\n```") == "`$a$` and\n```\n$b$\n```"
    assert draw_formulas("$a|b$").startswith('<img class="math" alt="a&#124;b"')
    with pytest.raises(UserError, match=r"\\nonsense.* cannot be drawn"):
        draw_formulas(r"$\nonsense$")
