"""The glossary: what it lists is in the chapters that it names, and what formulas use is in it."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FORMULA = re.compile(r"\$([^$\n]+)\$")
# In a formula, letters outside of words: \text{…} and names such as \frac hold others.
LETTER = re.compile(r"\\alpha|(?<![a-zA-Z\\])[a-zA-Z]+(?![a-zA-Z])")
# Letters of one paragraph, which explains them, and of mathematics: e to the power of z, sums over v and w, dx and dy.
LOCAL = {"01": {"n"}, "04": {"e", "v", "x"}, "11": {"w", "x", "T"}, "12": {"dx", "dy"}}


def text_of(chapter):
    (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


TEXTS = {path.name[:2]: text_of(path.name[:2]) for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")}
GLOSSARY = (NOTEBOOKS / "glossary.md").read_text(encoding="utf-8")


def rows(heading):
    """The rows of a section's table as {first column: chapters}."""
    section = GLOSSARY.split(f"\n## {heading} ")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    return {name: chapters.split(", ") for name, *_, chapters in cells}


def split(names):
    return names.replace("$", "").split(", ")


def letters(chapter):
    """The letters in the formulas of a chapter."""
    formulas = (re.sub(r"\\text\{[^}]*\}", " ", formula) for formula in FORMULA.findall(TEXTS[chapter]))
    words = (word for formula in formulas for word in LETTER.findall(formula))
    return {letter for word in words for letter in ([word] if word in ("\\alpha", "dx", "dy") else word)}


def uses(chapter, letter):
    """Whether a chapter has a letter in a formula, or by itself in the text, as in (m + 1)Ψ."""
    return letter in letters(chapter) or re.search(rf"(?<![a-zA-Z]){re.escape(letter)}(?![a-zA-Z])", TEXTS[chapter])


@pytest.mark.parametrize("chapter", TEXTS)
def test_every_letter_of_a_formula_is_in_the_table_with_its_chapter(chapter):
    listed = {letter for names, where in rows("Symbols").items() if chapter in where for letter in split(names)}
    assert letters(chapter) <= listed | LOCAL.get(chapter, set())


def test_every_symbol_is_used_in_the_chapters_of_its_row():
    wrong = []
    for names, where in rows("Symbols").items():
        found = {letter: {chapter for chapter in where if uses(chapter, letter)} for letter in split(names)}
        wrong += [letter for letter, chapters in found.items() if not chapters]
        wrong += [(names, chapter) for chapter in where if chapter not in set().union(*found.values())]
    assert not wrong


@pytest.mark.parametrize("heading", ["Units", "Terms"])
def test_every_unit_and_term_is_used_in_the_chapters_of_its_row(heading):
    wrong = []
    for names, where in rows(heading).items():
        for chapter in where:
            text = TEXTS[chapter] if heading == "Units" else TEXTS[chapter].lower()
            wrong += [(name, chapter) for name in names.split(", ") if name not in text]
    assert not wrong


def test_terms_are_in_alphabetical_order_without_repetition():
    terms = list(rows("Terms"))
    assert terms == sorted(set(terms))
    assert len(terms) == GLOSSARY.split("\n## Terms ")[1].count("\n| ") - 1
