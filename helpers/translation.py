"""Carry the code of the English chapters over to their translations.

    python -m helpers.translation

A translation has the file name and the cell ids of its chapter, in ``notebooks/zh``, and its own text. Its code cells,
with outputs and metadata, and the order of all cells are the English ones: run the command when a chapter has changed.
"""

import argparse
import json
from pathlib import Path

from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write, read_json_object
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
    tasks = {"translate": wanted - texts.keys(), "remove": texts.keys() - wanted}
    if todo := [f"{verb} {', '.join(sorted(names))}" for verb, names in tasks.items() if names]:
        raise UserError(f"the text cells differ from the chapter's; {'; '.join(todo)}")
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
        missing = f"{path} has no English chapter of this name in {NOTEBOOKS}; rename or remove it"
        chapter, translation = (read_json_object(file, missing) for file in (NOTEBOOKS / path.name, path))
        try:
            updated = carry_over(chapter, translation)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(updated, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(paths)} translations have the code of their chapters")


if __name__ == "__main__":
    exit_with_one_line(main)
