"""Make slides of the notebooks: ``make slides``, or ``python -m helpers.slides FOLDER``.

The notebooks are the only source, and hold nothing for it: headings start slides, figures, tables and short code are
kept, and of the text the first paragraph. The rest of the text is one key away. A deck is a single HTML file that needs
no network: figures and formulas are in it, and the few lines of script that turn its pages.
"""
