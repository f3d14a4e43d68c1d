"""Every judge accepts the notebook's own solution and rejects typical wrong answers, with the sentence that helps."""

import ast
import json
import re
from contextlib import suppress
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest
from exercise_answers import RIGHT, WRONG

from helpers.exercises import answers, chapter_02

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHAPTERS = [path.stem.removeprefix("chapter_") for path in Path(answers.__file__).parent.glob("chapter_*.py")]
JUDGES = {chapter: import_module(f"helpers.exercises.chapter_{chapter}") for chapter in sorted(CHAPTERS)}
PREAMBLE = """
import torch
import torch.distributed as dist
from helpers.launch import device
"""
MAGIC = re.compile(r"^[!%].*", re.MULTILINE)  # what is not Python: a command of the shell or of the notebook
PROGRAM = re.compile(r"%%writefile \{(\w+)(?:\.parent\}/([\w.]+)|\})\n")  # a variable, and a file beside its own
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def cells(chapter):
    (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def judged(source, module):
    """Names of the judges that a cell calls."""
    return re.findall(rf"^{module}\.(\w+)\(", source, re.MULTILINE)


def solutions(chapter):
    """The notebook's own answer to each judge: the cell itself, or the first block of the solution below it."""
    found, module = {}, f"chapter_{chapter}"
    all_cells = cells(chapter)
    for number, cell in enumerate(all_cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        for name in judged(source, module):
            program = program_above(all_cells, number)
            if program or "practice" in cell["metadata"]:
                found[name] = program or source
            else:
                text = "".join(all_cells[number + 1]["source"])
                found[name] = BLOCK.search(text[text.index("<summary>Solution") :])[1]
    return found


def program_above(all_cells, number):
    """The code cells above this one if they write a program to its files, which this one judges; else None."""
    above = ["".join(cell["source"]) for cell in all_cells[:number] if cell["cell_type"] == "code"]
    written = list(takewhile(PROGRAM.match, reversed(above)))
    return "\n".join(reversed(written)) or None


def define(chapter, name, code, folder):
    """What a cell with ``code`` would define in the place of the one that calls the judge ``name``.

    A program's files are written into ``folder``; the cells' variable is its path.
    """
    namespace = {"__name__": "answer"}
    if PROGRAM.match(code):
        _, *files = PROGRAM.split(code)
        for variable, beside, text in zip(files[::3], files[1::3], files[2::3], strict=True):
            namespace[variable] = folder / "program.py"
            (folder / (beside or "program.py")).write_text(text)
        return namespace
    for cell in cells(chapter):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if name in judged(source, f"chapter_{chapter}"):
            break
        python = "" if source.startswith("%%") else MAGIC.sub("", source)
        for node in filter(defines, ast.parse(python).body):
            with suppress(NameError, LookupError):  # what is measured on the machine, and what builds on it
                exec(compile(ast.Module([node], []), "<chapter>", "exec"), namespace)
    tree = ast.parse(PREAMBLE + code)
    kept = [node for node in tree.body if defines(node) or (isinstance(node, ast.Assign) and not calls(node, "run"))]
    exec(compile(ast.Module(kept, []), "<answer>", "exec"), namespace)
    return namespace


def defines(node):
    """Whether a statement imports, or defines a function, a class, a setting in capitals or a value without a call."""
    if isinstance(node, ast.Assign):
        setting = all(isinstance(target, ast.Name) and target.id.isupper() for target in node.targets)
        return setting or not calls(node)
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def calls(node, name=None):
    """Whether a statement calls the function of that name, or any."""
    found = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return any(name is None or getattr(function, "id", None) == name for function in found)


def answer(chapter, name, given):
    """An answer's code: itself, or the notebook's solution with something else in one place."""
    if isinstance(given, str):
        return given
    right, instead = given
    code = solutions(chapter)[name]
    assert code.count(right) == 1, f"the solution of {name} has {code.count(right)} times {right!r}"
    return code.replace(right, instead)


def arguments(chapter, name, namespace):
    """What the notebook hands to the judge."""
    for cell in cells(chapter):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and name in judged(source, f"chapter_{chapter}"):
            call = ast.parse(source).body[-1].value
            return [namespace[argument.id] for argument in call.args]
    raise AssertionError(f"no cell of chapter {chapter} calls {name}")


SOLVED = [(chapter, name) for chapter in JUDGES for name in solutions(chapter)]
CASES = [(chapter, name, sentence) for (chapter, name), wrong in WRONG.items() for sentence in wrong]


@pytest.mark.slow
@pytest.mark.parametrize("chapter, name", SOLVED)
def test_the_solution_is_right(chapter, name, tmp_path):
    namespace = define(chapter, name, solutions(chapter)[name], tmp_path)
    verdict = getattr(JUDGES[chapter], name)(*arguments(chapter, name, namespace))
    assert repr(verdict) == "right" and verdict.right


@pytest.mark.slow
@pytest.mark.parametrize("chapter, name, code", RIGHT)
def test_another_right_answer_is_right_too(chapter, name, code, tmp_path):
    namespace = define(chapter, name, answer(chapter, name, code), tmp_path)
    assert repr(getattr(JUDGES[chapter], name)(*arguments(chapter, name, namespace))) == "right"


@pytest.mark.slow
@pytest.mark.parametrize("chapter, name, sentence", CASES)
def test_a_wrong_answer_is_explained(chapter, name, sentence, monkeypatch, tmp_path):
    if "does not return" in sentence:
        monkeypatch.setattr(answers, "SECONDS", 3.0)
    namespace = define(chapter, name, answer(chapter, name, WRONG[chapter, name][sentence]), tmp_path)
    verdict = getattr(JUDGES[chapter], name)(*arguments(chapter, name, namespace))
    assert not verdict.right and verdict.text.startswith("not yet: ") and sentence in verdict.text


@pytest.mark.parametrize("chapter, name", SOLVED)
def test_every_exercise_has_two_wrong_answers(chapter, name):
    assert len(WRONG[chapter, name]) >= 2


def test_a_blank_is_no_wrong_answer():
    assert repr(chapter_02.lora_traffic(None, 3.0)) == "not answered yet"
    assert repr(answers.exercise(lambda answer: answers.call(answer))(blank)) == "not answered yet"


def test_an_endless_loop_in_this_process_is_an_answer(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.2)
    text = answers.exercise(lambda answer: answers.call(answer))(endless).text
    assert text.startswith("not yet: it raised TimeoutError: it does not return within 0.2 s (line ")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Cells make files: chapter 10 makes the folder that it measures."""
    monkeypatch.chdir(tmp_path)


def endless():
    while True:
        pass


def blank():
    raise NotImplementedError("yours")
