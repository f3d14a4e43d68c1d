"""Every name that a notebook imports from helpers/ documents its arguments, its result and its errors."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports_of_notebooks():
    """The (module, name) pairs of `from helpers.module import name` in code cells."""
    found = set()
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code" and "helpers" in (source := "".join(cell["source"])):
                source = re.sub(r"^\s*[%!].*", "", source, flags=re.MULTILINE)  # IPython's own syntax
                froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
                found |= {(f.module, name.name) for f in froms if f.module.startswith("helpers") for name in f.names}
    return sorted(found)


def documented():
    """Functions, classes and public methods behind these names; not constants and modules."""
    for module, name in imports_of_notebooks():
        value = getattr(importlib.import_module(module), name, None)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield f"{module}.{name}", value
        if inspect.isclass(value):
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)  # of a staticmethod or a classmethod
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{module}.{name}.{method}", function


def missing(value):
    """What the docstring of a function or a class lacks."""
    doc = inspect.cleandoc(value.__doc__ or "")
    is_class = inspect.isclass(value)
    own_parameters = not is_class or "__init__" in vars(value) or hasattr(value, "_fields")
    signature = inspect.signature(value) if own_parameters else inspect.Signature()
    names = [name for name in signature.parameters if name not in ("self", "cls", "ctx") and not name.startswith("_")]
    if dataclasses.is_dataclass(value):  # a base class documents the fields that it defines
        names = [name for name in names if name in vars(value).get("__annotations__", {})]
    patterns = {name: rf"^ +\*{{0,2}}{name}( \([^)]*\))?:" for name in names}
    if names:
        patterns["Args"] = "^(Args|Attributes):"
    if not is_class and signature.return_annotation not in (None, "None", inspect.Signature.empty):
        patterns["Returns"] = "^(Returns|Yields):"
    if not is_class and "raise UserError" in inspect.getsource(value):
        patterns["Raises"] = "^Raises:"
    return [name for name, pattern in patterns.items() if not re.search(pattern, doc, re.MULTILINE)]


@pytest.mark.parametrize("name, value", [pytest.param(name, value, id=name) for name, value in documented()])
def test_the_docstring_is_complete(name, value):
    assert value.__doc__ and not missing(value)


def test_no_file_has_more_than_300_lines():
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in ROOT.glob("helpers/**/*.py")}
    assert not {path: count for path, count in lines.items() if count > 300}
