"""Sphinx's settings for the website: ``make site``.

The repository is the source folder, so that the site has the pages, links and pictures that readers of the repository
have, and nothing to maintain beside them. Recorded outputs are shown; no notebook is executed. Pages load nothing from
other hosts: Furo and Sphinx bring their scripts along, and ``pages.py`` draws the formulas.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]  # for pages.py and helpers/

project = "Train large models on several GPUs"
extensions = ["myst_nb", "pages"]
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "drawn"
root_doc = "README"
include_patterns = [
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    "notebooks/[0-9][0-9]_*.ipynb",
    "notebooks/zh/[0-9][0-9]_*.ipynb",
    "notebooks/glossary.md",
    "notebooks/teaching/*.md",
]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "pages.anchor"
