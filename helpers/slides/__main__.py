"""The command: write the slides of every chapter into a folder."""

import argparse
import json
from pathlib import Path

from helpers.errors import exit_with_one_line
from helpers.files import atomic_write
from helpers.notebooks import NOTEBOOKS, find_chapters
from helpers.slides.deck import make_deck
from helpers.slides.page import write_page


def main() -> None:
    """Write an HTML file per chapter."""
    parser = argparse.ArgumentParser(prog="python -m helpers.slides", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=NOTEBOOKS, help="folder of the notebooks")
    arguments = parser.parse_args()
    chapters = find_chapters(arguments.source)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for path in chapters:
        slides = make_deck(json.loads(path.read_text(encoding="utf-8")))
        page = write_page(slides[0].title, slides, path.parent)
        with atomic_write(arguments.folder / f"{path.stem}.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
    print(f"{len(chapters)} decks in {arguments.folder}: open one in a browser; arrow keys turn it, n shows the notes")


if __name__ == "__main__":
    exit_with_one_line(main)
