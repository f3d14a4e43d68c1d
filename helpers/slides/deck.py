"""Divide a notebook into slides: what is shown, what goes to the notes, and at which line a slide is full."""

import base64
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.notebooks import Cell, Notebook, source

MOST_CODE = 20  # lines; of a longer cell only the output is shown
COMPARED = "# NBVAL_CHECK_OUTPUT\n"  # for the tests, not for the reader
MOST_PRINTED = 14  # lines
HEIGHT = 26  # lines on a slide
LINE_HEIGHT = 23  # pixels, on a screen of 1280 x 720
SHRUNK = 0.68  # how far a figure may shrink there: then its text is 12 pixels high
FIGURE_HEIGHT = 24  # lines that a figure takes at most
LINE = 90  # characters
HEADING = re.compile(r"#{1,4} (.+)")
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
EXERCISE = re.compile(r"\*\*(\d+ · .+?)\*\* ")


@dataclass
class Slide:
    """One page.

    Attributes:
        title: Its heading, as Markdown.
        cells: What is shown below it, from top to bottom.
        notes: Paragraphs that are left out, as Markdown.
        height: Lines that the cells take.
        figures: Of these, the lines of each figure; it may have more if the slide has room.
    """

    title: str
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    height: int = 0
    figures: list[int] = field(default_factory=list)

    @property
    def figure_room(self) -> float:
        """Lines that each figure can have: what everything else leaves of the slide."""
        return (HEIGHT - self.height + sum(self.figures)) / max(1, len(self.figures))


def make_deck(notebook: Notebook) -> list[Slide]:
    """Divide a notebook into slides.

    A heading starts a slide, and so does whatever no longer fits. Exercises are there without their solutions.

    Args:
        notebook: The notebook, as JSON, with its outputs.

    Returns:
        The slides, in the notebook's order.
    """
    slides: list[Slide] = []
    exercises = False
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            shown = None if exercises else _shown(cell)
            if shown:
                _add(slides, *shown)
            continue
        lead = True  # the first paragraph after a heading or a code cell
        for block in _blocks(source(cell)):
            heading, exercise = HEADING.match(block), EXERCISE.match(block)
            if heading and heading[1] == "References":
                return slides
            if heading:
                exercises |= heading[1] == "Exercises"
                slides.append(Slide(heading[1]))
                lead = True
            elif exercise:
                slides.append(Slide(f"Exercise {exercise[1]}"))
                _add(slides, _markdown(block[exercise.end() :]), _text_height(block))
            elif lead or not _is_prose(block):
                _add(slides, _markdown(block), _text_height(block))
                lead = lead and not _is_prose(block)
            else:
                slides[-1].notes.append(block)
    return slides


def _add(slides: list[Slide], cell: Cell, height: int, figures: Sequence[int] = ()) -> None:
    """Put a cell onto the last slide, or onto a new one of the same title if it does not fit."""
    if slides[-1].cells and slides[-1].height + height > HEIGHT:
        slides.append(Slide(slides[-1].title))
    slides[-1].cells.append(cell)
    slides[-1].height += height
    slides[-1].figures += figures


def _blocks(text: str) -> Iterator[str]:
    """Split Markdown into headings, paragraphs, lists, tables and code; folded parts are left out."""
    for block in re.split(r"(```.*?```)|\n\s*\n", FOLDED.sub("", text), flags=re.DOTALL):
        while block and HEADING.match(block.strip()):
            first, _, block = block.strip().partition("\n")
            yield first
        if block and block.strip():
            yield block.strip()


def _is_prose(block: str) -> bool:
    """Whether a block is a paragraph; tables, lists, formulas, pictures and code are not."""
    return not re.match(r"\||[-*] |\d+\. |\$\$|```|!\[", block)


def _text_height(block: str) -> int:
    return 1 + sum(-(-len(line) // LINE) for line in block.splitlines())


def _shown(cell: Cell) -> tuple[Cell, int, list[int]] | None:
    """Return what a slide shows of a code cell, its height in lines, and its figures'; None if that is nothing."""
    outputs = [kept for output in cell["outputs"] if (kept := _output(output))]
    height = sum(height for _, height in outputs)
    code = source(cell).removeprefix(COMPARED)
    lines = len(code.splitlines())
    hidden = lines > min(MOST_CODE, HEIGHT - height - 1)
    if hidden and not outputs:
        return None
    shown: Cell = {
        "source": code,
        "metadata": {"transient": {"remove_source": hidden}},
        "outputs": [output for output, _ in outputs],
    }
    figures = [height for output, height in outputs if "image/png" in output.get("data", {})]
    return cell | shown, height + (0 if hidden else lines + 1), figures


def _output(output: dict[str, Any]) -> tuple[dict[str, Any], int] | None:
    """Return a figure or table as it is, or the first lines of text; and its height in lines."""
    if output["output_type"] == "stream":
        if output["name"] == "stderr":
            return None
        text, lines = _first_lines(output["text"])
        return output | {"text": text}, lines
    data = output.get("data", {})
    if "image/png" in data:
        return output | {"data": {"image/png": data["image/png"]}}, _figure_height(data["image/png"])
    if "text/markdown" in data:
        table = "".join(data["text/markdown"])
        return output | {"data": {"text/markdown": table}}, _text_height(table)
    text, lines = _first_lines(data.get("text/plain", ""))
    return (output | {"data": {"text/plain": text}}, lines) if lines else None


def _figure_height(png: str) -> int:
    """Return the lines of text whose place a figure takes at least."""
    header = base64.b64decode("".join(png)[:32])  # signature, and a chunk that begins with width and height
    _, height = struct.unpack(">II", header[16:24])
    return min(FIGURE_HEIGHT, math.ceil(SHRUNK * height / LINE_HEIGHT))


def _first_lines(text: str | list[str]) -> tuple[str, int]:
    lines = "".join(text).splitlines()
    if len(lines) > MOST_PRINTED:
        lines = [*lines[: MOST_PRINTED - 1], "…"]
    return "\n".join(lines), len(lines)


def _markdown(text: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": text}
