"""Find the course's notebooks, and read the text of their cells."""

from pathlib import Path
from typing import Any

from helpers.errors import UserError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS = "[0-9][0-9]_*.ipynb"

Cell = dict[str, Any]
Notebook = dict[str, Any]


def find_chapters(folder: Path) -> list[Path]:
    """Find the notebooks of the chapters.

    Args:
        folder: Where they are.

    Returns:
        Their files, in the order of the chapters.

    Raises:
        UserError: The folder has no chapters.
    """
    chapters = sorted(folder.glob(CHAPTERS))
    if not chapters:
        raise UserError(f"{folder} holds no chapters ({CHAPTERS}); name the folder of the worked notebooks")
    return chapters


def source(cell: Cell) -> str:
    """Return a cell's text, which JSON holds as one string or as a list of lines."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
