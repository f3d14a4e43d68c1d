"""Write slides as one self-contained HTML page."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.notebooks import Cell
from helpers.slides.deck import Slide
from helpers.slides.formulas import draw_formulas

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

LINE = 3.1  # height of a line in percent of the screen
STYLE = """
* { box-sizing: border-box }
body { margin: 0; font: 2.3vh/1.4 "Helvetica Neue", Arial, sans-serif; color: #222; background: #fff }
section { height: 100vh; padding: 3vh 5vw; overflow: auto; break-after: page }
.turning section:not(.here) { display: none }
h1, h2, h3, h4 { font-size: 1.6em; line-height: 1.2; margin: 0 0 .6em; color: #0b5394 }
p, ul, ol, table, pre { margin: 0 0 .6em }
code, pre { font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em }
pre { line-height: 1.3; white-space: pre-wrap }
.input pre { background: #f5f5f5; padding: .5em .8em; border-radius: .3em }
.output_png img, p > img:not(.math) { max-height: var(--room); max-width: 100% }
.formula { text-align: center }
table { border-collapse: collapse }
th, td { padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: left }
aside { display: none; margin-top: 1em; padding: .6em 1em; background: #fff8e1; font-size: .85em }
.notes aside { display: block }
#place { position: fixed; right: 1vw; bottom: 1vh; color: #888; font-size: .8em }
@media print { aside, #place { display: none } .turning section:not(.here) { display: block } }
"""
# Without a script the page still shows all slides, one below the other.
SCRIPT = """
const slides = [...document.querySelectorAll("section")], place = document.getElementById("place");
let at = 0;
function show(number) {
  at = Math.min(Math.max(number, 0), slides.length - 1);
  slides.forEach((slide, index) => slide.classList.toggle("here", index === at));
  place.textContent = `${at + 1} / ${slides.length}`;
  history.replaceState(null, "", `#${at + 1}`);
}
const turns = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in turns) show(at + turns[event.key]);
  else if (event.key === "Home") show(0);
  else if (event.key === "End") show(slides.length - 1);
  else if (event.key === "n") document.body.classList.toggle("notes");
  else return;
  event.preventDefault();
});
addEventListener("hashchange", () => show(parseInt(location.hash.slice(1)) - 1 || 0));
document.body.classList.add("turning");
show(parseInt(location.hash.slice(1)) - 1 || 0);
"""


def write_page(title: str, slides: Sequence[Slide], folder: Path) -> str:
    """Write slides as HTML.

    Args:
        title: Of the page.
        slides: What to show.
        folder: Where the notebook is, for pictures that its text links to.

    Returns:
        The page: the arrow keys turn it, and ``n`` shows or hides the notes.

    Raises:
        UserError: A formula cannot be drawn.
    """
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        embed_images=True,
    )
    sections = []
    for slide in slides:
        shown = _render(exporter, [_text(f"## {slide.title}"), *map(_with_drawn_formulas, slide.cells)], folder)
        notes = _render(exporter, [_text("\n\n".join(slide.notes))], folder) if slide.notes else ""
        room = f"--room: {LINE * slide.figure_room:.1f}vh"
        sections.append(f'<section style="{room}">{shown}{f"<aside>{notes}</aside>" if notes else ""}</section>')
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{colours}{STYLE}</style>'
    body = "\n".join([*sections, '<div id="place"></div>', f"<script>{SCRIPT}</script>"])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _render(exporter: "HTMLExporter", cells: Sequence[Cell], folder: Path) -> str:
    from nbformat import from_dict

    numbered = [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)]
    notebook = from_dict({"cells": numbered, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    return exporter.from_notebook_node(notebook, {"metadata": {"path": str(folder)}})[0]


def _with_drawn_formulas(cell: Cell) -> Cell:
    if cell["cell_type"] == "markdown":
        return cell | {"source": draw_formulas(cell["source"])}
    return cell | {"outputs": [_output(output) for output in cell["outputs"]]}


def _output(output: dict[str, Any]) -> dict[str, Any]:
    table = output.get("data", {}).get("text/markdown")
    return output | {"data": {"text/markdown": draw_formulas(table)}} if table else output


def _text(markdown: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": draw_formulas(markdown)}
