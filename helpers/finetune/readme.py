"""Write the newest measurements into the front pages and configs/README.md: tables between their markers, and figures.

python -m helpers.finetune.readme
"""

from pathlib import Path

from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.finetune.full_results import FULL_RESULTS, full_table
from helpers.finetune.results import (
    OFFLOAD_RESULTS,
    RESULTS,
    ROOT,
    SPEED_RESULTS,
    gpu_table,
    memory_figure,
    offload_table,
    read_results,
    run_figure,
    speed_figure,
    speed_table,
)
from helpers.finetune.scaling import SCALING_RESULTS, scaling_figure, scaling_table
from helpers.plots import save_figure

END = "<!-- end of results -->"
TABLES = {
    RESULTS: gpu_table,
    SPEED_RESULTS: speed_table,
    FULL_RESULTS: full_table,
    OFFLOAD_RESULTS: offload_table,
    SCALING_RESULTS: scaling_table,
}
# The tables of each page.
PAGES = {
    ROOT / "README.md": (RESULTS,),
    ROOT / "README.zh-CN.md": (RESULTS,),
    ROOT / "configs" / "README.md": (SPEED_RESULTS, FULL_RESULTS, OFFLOAD_RESULTS, SCALING_RESULTS),
}


def with_table(text: str, name: str, table: str) -> str:
    """Put a table between its markers.

    Args:
        text: Of the page.
        name: Of the table, in the marker that begins it.
        table: What to put there.

    Returns:
        The text with the table.

    Raises:
        UserError: The text has no such markers.
    """
    marker = f"<!-- results: {name} -->"
    before, begin, rest = text.partition(marker)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the page has no place for the table; put {marker} and {END} where it should go")
    return f"{before}{marker}\n{table}\n{END}{after}"


def with_tables(page: Path) -> str:
    """Return a page's text with the newest measurements; what was not measured stays as it is.

    Args:
        page: One of ``PAGES``.

    Returns:
        The whole text.
    """
    text = page.read_text(encoding="utf-8")
    for path in filter(Path.is_file, PAGES[page]):
        text = with_table(text, path.stem, TABLES[path](read_results(path)))
    return text


def main() -> None:
    """Update the pages and their figures."""
    for page in PAGES:
        text = with_tables(page)
        with atomic_write(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    save_figure(run_figure(), RESULTS.with_name("finetune_6b_timeline.png"))
    save_figure(memory_figure(read_results()), RESULTS.with_name("finetune_6b.png"))
    save_figure(speed_figure(read_results(SPEED_RESULTS)), RESULTS.with_name("speed_6b.png"))
    if SCALING_RESULTS.is_file():
        save_figure(scaling_figure(read_results(SCALING_RESULTS)), SCALING_RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    exit_with_one_line(main)
