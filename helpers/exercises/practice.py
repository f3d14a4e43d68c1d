"""Write the practice edition: every notebook with its core functions blank, and hints in their place.

    python -m helpers.exercises.practice FOLDER [--source NOTEBOOKS]

The worked notebooks are the only source. A core cell's metadata say what is blank and hold three hints::

    "practice": {"blank": ["reduce_round", "Bucket.collect"], "hints": ["...", "...", "..."]}

In the practice edition these bodies raise NotImplementedError; signature and docstring stay. The cell still ends with
its judge, and later cells use what the learner wrote. Cells that write a program (``%%writefile``) have its judge in
the next code cell that writes none. Solutions are a link to the worked edition, and outputs stay, labelled as recorded.
"""

import argparse
import ast
import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.notebooks import NOTEBOOKS, Cell, Notebook, find_chapters, source

SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>", re.DOTALL)
LINK = re.compile(r"(\]\()(?!https?:|#|[0-9]{2}_\w+\.ipynb)([^)]+\))")
MACHINE = re.compile(r"^GPU +(\d+ x [^,\n]+)", re.MULTILINE)
MAGIC = "%%"  # begins a cell that is not run, but for example written to a file
# Cells find files from the worked notebooks' folder. Run twice, the line changes nothing.
SETUP = 'import os\n\nif os.path.basename(os.getcwd()) == "practice":\n    os.chdir("..")'


def practice_edition(notebook: Notebook, name: str) -> Notebook:
    """Make the practice edition of a worked notebook.

    Args:
        notebook: The worked notebook, as JSON.
        name: Its file name, for the links to it.

    Returns:
        A new notebook.

    Raises:
        UserError: A cell's metadata name a function that it does not define.
    """
    machine = _machine(notebook)
    cells: list[Cell] = []
    for cell in copy.deepcopy(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            text = SOLUTION.sub(f"[The worked chapter](../{name}) has a solution.", source(cell))
            cells.append(cell | {"source": LINK.sub(r"\1../\2", text)})
            continue
        wanted = cell["metadata"].pop("practice", None)
        if wanted:
            try:
                cell["source"] = blank(source(cell), wanted["blank"])
            except KeyError as error:
                raise UserError(f"{name}, cell {cell['id']}: it does not define {error.args[0]}") from None
            cell["outputs"] = []
            written = source(cell).startswith(MAGIC)
            cells.append(_task(f"{cell['id']}-task", wanted, name, written))
        elif cell["outputs"]:
            cell["outputs"].insert(0, _label(machine))
        cell["execution_count"] = None
        cells.append(cell)
    cells.insert(1, _markdown("practice", _welcome(machine, name)))
    cells.insert(2, _code("practice-setup", SETUP))
    return notebook | {"cells": cells}


def blank(code: str, names: Sequence[str]) -> str:
    """Replace the bodies of functions by ``raise NotImplementedError``; docstrings stay.

    Args:
        code: A cell.
        names: Functions, or methods as ``Class.method``.

    Returns:
        The cell with the rest as it was.

    Raises:
        KeyError: The cell does not define one of them.
    """
    lines = code.splitlines(keepends=True)
    found = dict(_functions(_parse(code)))
    for name in sorted(names, key=lambda name: -found[name].lineno):
        lines[_body(found[name])] = [_yours(found[name], name)]
    return "".join(lines)


def fill(practised: str, worked: str, names: Sequence[str]) -> str:
    """Put a worked cell's bodies into the blanks of the practice edition: the inverse of :func:`blank`.

    Args:
        practised: The cell of the practice edition.
        worked: The worked cell.
        names: The blank functions.

    Returns:
        The filled cell.
    """
    for name in names:
        function = dict(_functions(_parse(worked)))[name]
        body = "".join(worked.splitlines(keepends=True)[_body(function)])
        practised = practised.replace(_yours(function, name), body)
    return practised


def _parse(code: str) -> ast.Module:
    """Parse a cell; a magic in its first line counts as a comment, so that lines keep their numbers."""
    return ast.parse(f"#{code}" if code.startswith(MAGIC) else code)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, ast.FunctionDef))


def _body(function: ast.FunctionDef) -> slice:
    """Find the lines of a function's body after its docstring, counted from 0."""
    documented = ast.get_docstring(function) is not None
    first = function.body[1 if documented and len(function.body) > 1 else 0]
    return slice(first.lineno - 1, function.end_lineno)


def _yours(function: ast.FunctionDef, name: str) -> str:
    """Return the line that takes the body's place; what it raises is read below a cell that uses the function."""
    message = f"yours: write the body of {name} and run its cell again"
    return " " * function.body[0].col_offset + f'raise NotImplementedError("{message}")\n'


def _task(identity: str, wanted: dict[str, Any], name: str, written: bool) -> Cell:
    functions = ", ".join(f"`{function}`" for function in wanted["blank"])
    bodies = "body" if len(wanted["blank"]) == 1 else "bodies"
    hints = "\n\n".join(
        f"<details><summary>Hint {number}</summary>\n\n{hint}\n</details>"
        for number, hint in enumerate(wanted["hints"], 1)
    )
    verdict = "the judge of the program tells you how it went" if written else "its last line tells you how it went"
    text = f"**Yours: {functions}.** Write the {bodies} in the cell below and run it: {verdict}."
    return _markdown(identity, f"{text}\n\n{hints}\n\n[The worked chapter](../{name}) has a solution.")


def _welcome(machine: str, name: str) -> str:
    return (
        "**Practice edition.** You write the core of this chapter. Run the cells from the top. At the first blank, a "
        "cell says “not answered yet”; write the function above that line and run the cell again. The cells below it "
        f"use what you wrote. Outputs that you have not made yourself were recorded on {machine}. "
        f"[The worked chapter](../{name}) explains the same without blanks."
    )


def _machine(notebook: Notebook) -> str:
    printed = (
        "".join(output.get("text", ""))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    )
    return next((match[1] for text in printed if (match := MACHINE.search(text))), "a machine without GPU")


def _label(machine: str) -> dict[str, Any]:
    text = f"*recorded on {machine}*"
    return {"output_type": "display_data", "data": {"text/markdown": text, "text/plain": text}, "metadata": {}}


def _markdown(identity: str, text: str) -> Cell:
    return {"cell_type": "markdown", "id": identity, "metadata": {}, "source": text}


def _code(identity: str, text: str) -> Cell:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": identity,
        "metadata": {},
        "outputs": [],
        "source": text,
    }


def main() -> None:
    """Write the practice edition of every chapter into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=NOTEBOOKS, help="folder of the worked notebooks")
    arguments = parser.parse_args()
    chapters = find_chapters(arguments.source)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for path in chapters:
        edition = practice_edition(json.loads(path.read_text(encoding="utf-8")), path.name)
        with atomic_write(arguments.folder / path.name) as temporary:
            temporary.write_text(json.dumps(edition, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(chapters)} notebooks in {arguments.folder}")


if __name__ == "__main__":
    exit_with_one_line(main)
