"""Wrong answers to the exercises, a module per chapter.

A module's WRONG has, by judge, what the verdict says and the answer: code, or a pair (what the notebook's solution has,
what stands there instead). Its RIGHT, if it has one, has other right answers by judge: those that a judge once refused.
"""

from importlib import import_module
from pathlib import Path

MODULES = {
    path.stem.removeprefix("chapter_"): import_module(f"{__name__}.{path.stem}")
    for path in sorted(Path(__file__).parent.glob("chapter_*.py"))
}
WRONG = {(chapter, judge): answers for chapter, module in MODULES.items() for judge, answers in module.WRONG.items()}
RIGHT = [
    (chapter, judge, answer)
    for chapter, module in MODULES.items()
    for judge, answers in getattr(module, "RIGHT", {}).items()
    for answer in answers
]
