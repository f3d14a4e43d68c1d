"""Wrong answers to the exercises, a module per chapter.

A module's WRONG has, by judge, what the verdict says and the answer: code, or a pair (what the notebook's solution has,
what stands there instead).
"""

from importlib import import_module
from pathlib import Path

WRONG = {
    (path.stem.removeprefix("chapter_"), judge): answers
    for path in sorted(Path(__file__).parent.glob("chapter_*.py"))
    for judge, answers in import_module(f"{__name__}.{path.stem}").WRONG.items()
}
