"""Draw the formulas of a text, so that a page needs no library from the network to show them."""

import base64
import functools
import html
import io
import re

from helpers.errors import UserError

POINTS = 100  # size of the letters that are drawn; coordinates are rounded to points
# Code first: a dollar sign in it begins no formula.
PARTS = re.compile(r"```.*?```|`[^`]*`|\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)


def draw_formulas(markdown: str) -> str:
    """Replace each formula of a text by a drawing.

    Args:
        markdown: Text with ``$...$`` and ``$$...$$``.

    Returns:
        The text with ``<img>`` elements that contain the drawings.

    Raises:
        UserError: Matplotlib, which draws them, does not know a command of a formula.
    """
    return PARTS.sub(_drawn, markdown)


def _drawn(match: re.Match[str]) -> str:
    display, inline = match["display"], match["inline"]
    if display:
        return f'<p class="formula">{draw_formula(" ".join(display.split()))}</p>'
    return draw_formula(inline) if inline else match[0]


@functools.cache
def draw_formula(formula: str) -> str:
    """Draw one formula.

    Args:
        formula: TeX, on one line and without dollar signs.

    Returns:
        An ``<img>`` element that contains the drawing.

    Raises:
        UserError: Matplotlib, which draws it, does not know a command.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    drawing = io.BytesIO()
    tex = f"${formula.replace('tfrac', 'frac')}$"  # matplotlib has no \tfrac
    try:
        depth = math_to_image(tex, drawing, prop=FontProperties(size=POINTS), format="svg")
    except ValueError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"the formula {tex} cannot be drawn ({reason}); write it in simpler TeX") from None
    height = float(re.findall(rb'<svg[^>]* height="([\d.]+)pt"', drawing.getvalue())[0])
    # Sizes in em grow with the text around the formula, and its base line is aligned with that of the text.
    style = f"height: {height / POINTS:.2f}em; vertical-align: {-depth / POINTS:.2f}em"
    data = base64.b64encode(drawing.getvalue()).decode("ascii")
    alt = html.escape(formula).replace("|", "&#124;")  # or it would divide the cell of a table
    return f'<img class="math" alt="{alt}" style="{style}" src="data:image/svg+xml;base64,{data}">'
