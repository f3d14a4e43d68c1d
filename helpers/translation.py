"""Carry the code of the English chapters over to their translations.

    python -m helpers.translation

A translation has the file name and the cell ids of its chapter, in ``notebooks/zh``, and its own text. Its code cells,
with outputs and metadata, and the order of all cells are the English ones: run the command when a chapter has changed.
"""

import argparse
import json
from pathlib import Path

from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.notebooks import NOTEBOOKS, Notebook, find_chapters

TRANSLATIONS = NOTEBOOKS / "zh"


def carry_over(chapter: Notebook, translation: Notebook) -> Notebook:
    """Return the translation with the chapter's code cells, in the chapter's order.

    Args:
        chapter: The English notebook, as JSON.
        translation: The translated notebook. Only its text is used.

    Returns:
        A new notebook.

    Raises:
        UserError: The two do not have text cells with the same ids.
    """
    texts = {cell["id"]: cell for cell in translation["cells"] if cell["cell_type"] == "markdown"}
    wanted = {cell["id"] for cell in chapter["cells"] if cell["cell_type"] == "markdown"}
    if differing := sorted(wanted ^ texts.keys()):
        missing, extra = wanted.intersection(differing), texts.keys() & differing
        raise UserError(
            f"translate the text cells {sorted(missing)} and remove {sorted(extra)}: "
            "a translation has the chapter's text cells, with their ids"
        )
    cells = [texts[cell["id"]] if cell["cell_type"] == "markdown" else cell for cell in chapter["cells"]]
    return chapter | {"cells": cells}


def main() -> None:
    """Update every translation in place."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.translation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--translations", type=Path, default=TRANSLATIONS, help="folder of the translations")
    paths = find_chapters(parser.parse_args().translations)
    for path in paths:
        try:
            chapter, translation = (json.loads(file.read_text("utf-8")) for file in (NOTEBOOKS / path.name, path))
            updated = carry_over(chapter, translation)
        except FileNotFoundError:
            raise UserError(f"{path} has no English chapter {NOTEBOOKS / path.name}; rename or remove it") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(updated, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(paths)} translations have the code of their chapters")


if __name__ == "__main__":
    exit_with_one_line(main)
