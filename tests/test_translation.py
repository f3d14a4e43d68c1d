"""A translated chapter has the code, the outputs and the facts of its chapter: numbers, names, formulas and links."""

import json
import os
import re

import pytest

from helpers.errors import UserError
from helpers.notebooks import NOTEBOOKS, find_chapters, source
from helpers.translation import TRANSLATIONS, carry_over

FENCE, CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL), re.compile(r"`[^`\n]+`")
FORMULA = re.compile(r"\$[^$\n]+\$")
LINK, HEADING = re.compile(r"\]\(([^)]+)\)"), re.compile(r"^#+ ", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])(\d+(?:[.,]\d+)*(?:e\d+)?)(?: (万|million))?")
SCALE = {"万": 1e4, "million": 1e6}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def facts(text, folder):
    """What a translation must not change, by kind; links to the text's own editions differ and are left out."""
    found = {"links": set()}
    for target in LINK.findall(text):
        path, _, place = target.partition("#")
        absolute = path if ":" in path else os.path.normpath(folder / path)
        if "/14_" not in absolute or place:
            found["links"].add((absolute, place))
    text = LINK.sub("]", text)
    for name, pattern in (("programs", FENCE), ("code", CODE), ("formulas", FORMULA)):
        found[name] = set(pattern.findall(text))
        text = pattern.sub(" ", text)
    numbers = ((number.replace(",", ""), unit) for number, unit in NUMBER.findall(text))
    found["numbers"] = {round(float(number) * SCALE[unit]) if unit else number for number, unit in numbers}
    found["headings"] = HEADING.findall(text)
    found["rows and items"] = len(re.findall(r"^(?:\||- |\d+\. )", text, re.MULTILINE))
    return found


@pytest.mark.parametrize("path", find_chapters(TRANSLATIONS), ids=lambda path: path.stem)
class TestTranslation:
    def test_its_code_cells_are_those_of_the_chapter(self, path):
        chapter, translation = read(NOTEBOOKS / path.name), read(path)
        assert [cell["id"] for cell in translation["cells"]] == [cell["id"] for cell in chapter["cells"]]
        for mine, original in zip(translation["cells"], chapter["cells"], strict=True):
            assert mine["cell_type"] == original["cell_type"]
            assert mine["cell_type"] == "markdown" or mine == original, "run python -m helpers.translation"
        assert translation["metadata"] == chapter["metadata"]

    def test_its_text_is_translated_with_the_same_facts(self, path):
        chapter = {cell["id"]: source(cell) for cell in read(NOTEBOOKS / path.name)["cells"]}
        for cell in read(path)["cells"]:
            if cell["cell_type"] == "markdown":
                text, original = source(cell), chapter[cell["id"]]
                assert re.search("[一-鿿]", text) and text != original, cell["id"]
                mine, theirs = facts(text, path.parent), facts(original, NOTEBOOKS)
                assert mine == theirs, cell["id"]

    def test_its_links_lead_somewhere(self, path):
        text = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
        targets = {target.partition("#")[0] for target in LINK.findall(text) if ":" not in target} - {""}
        assert not [target for target in targets if not (path.parent / target).exists()]


def notebook(*cells):
    return {"cells": [{"cell_type": kind, "id": name, "source": text} for kind, name, text in cells], "nbformat": 4}


def test_code_comes_from_the_chapter_and_text_from_the_translation():
    chapter = notebook(("code", "a", "x = 1"), ("markdown", "b", "one"), ("markdown", "c", "two"))
    translation = notebook(("markdown", "c", "二"), ("markdown", "b", "一"), ("code", "old", "x = 0"))
    expected = notebook(("code", "a", "x = 1"), ("markdown", "b", "一"), ("markdown", "c", "二"))
    assert carry_over(chapter, translation) == expected


def test_text_that_is_not_translated_is_named():
    chapter, translation = notebook(("markdown", "b", "one")), notebook(("markdown", "c", "二"))
    with pytest.raises(UserError, match=r"differ from the chapter's; translate b; remove c$"):
        carry_over(chapter, translation)
