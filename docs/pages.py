"""What Sphinx leaves to the website: navigation, drawn formulas, JupyterLab's anchors, an index page."""

import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

from helpers.errors import UserError
from helpers.slides.formulas import draw_formula

ROOT = Path(__file__).resolve().parents[1]

# Sphinx builds its navigation from these lists; GitHub would show them as text, so they are not in the files.
NAVIGATION = {
    "Chapters": ["notebooks/[0-9]*", "notebooks/glossary"],
    "The job": ["configs/README"],
    "Teaching": ["notebooks/teaching/README", "notebooks/teaching/plans", "notebooks/teaching/[0-9]*"],
    "中文": ["README.zh-CN", "notebooks/zh/[0-9]*"],
    "The code": ["CONTRIBUTING"],
}


def add_navigation(app: Sphinx, page: str, content: list[str]) -> None:
    """Append the lists of pages to the front page, hidden: the sidebar shows them.

    Args:
        app: The application.
        page: The page that was read.
        content: Its text, as the only item, which is changed in place.
    """
    if page == app.config.root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(name for name in pages if any(ROOT.glob(f"{name}.*")))
            content[0] += f"\n\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def anchor(heading: str) -> str:
    """Name the place of a heading as JupyterLab does, so that one link works in both.

    Args:
        heading: Its text.

    Returns:
        What stands behind the ``#`` of a link.
    """
    return heading.strip().replace(" ", "-")


def write_formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as a drawing.

    Args:
        translator: What writes the page.
        node: The formula, in the line or on lines of its own.

    Raises:
        ExtensionError: It cannot be drawn.
    """
    try:
        image = draw_formula(" ".join(node.astext().split()))
    except UserError as error:
        raise ExtensionError(str(error)) from None
    displayed = isinstance(node, nodes.math_block)
    translator.body.append(f'<p class="formula">{image}</p>' if displayed else image)
    raise nodes.SkipNode


def describe_figures(app: Sphinx, page: nodes.document) -> None:
    """Give each figure of a notebook its text, which MyST-NB leaves out: what a cell would print in its place.

    Args:
        app: The application.
        page: The page, changed in place.
    """
    for output in page.findall(nodes.container):
        if output.get("nb_element") == "mime_bundle":
            printed = [part.astext() for part in output.children if part.get("mime_type") == "text/plain"]
            for image in output.findall(nodes.image):
                image["alt"] = " ".join(printed)


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Copy the front page to where servers look for it.

    Args:
        app: The application.
        error: Why the build failed, or None.
    """
    if error is None:
        shutil.copyfile(app.outdir / f"{app.config.root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions of this file.

    Args:
        app: The application.

    Returns:
        That pages may be read and written side by side.
    """
    app.add_html_math_renderer("drawn", (write_formula, None), (write_formula, None))
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", describe_figures)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
