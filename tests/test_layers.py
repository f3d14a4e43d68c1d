"""The packages of helpers/ form layers: each imports lower ones only, and planning needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up. Packages of one line do not import each other. A command that reads a job's data is above the job,
# although its name is that of the package below.
LAYERS = """
errors
files notebooks
assets config libraries translation
memory
activations hardware
memory.predict chatglm3 launch
quantization parallel plots
finetune exercises ready
slides
memory.predict.__main__
"""
LEVEL = {name: level for level, names in enumerate(LAYERS.split("\n")) for name in names.split()}


def package(module):
    """The longest package name that ``module`` begins with: helpers.memory.predict.step is in memory.predict."""
    return max((name for name in LEVEL if f"{module}.".startswith(f"helpers.{name}.")), key=len, default=None)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# helpers/__init__.py prepares every process, and only imports a list of warnings.
FILES = sorted({path.relative_to(ROOT).as_posix() for path in ROOT.glob("helpers/**/*.py")} - {"helpers/__init__.py"})


@pytest.mark.parametrize("file", FILES)
def test_a_package_imports_lower_ones_only(file):
    own = package(file.removesuffix(".py").replace("/", "."))
    assert own, f"add {file} to a layer of this test"
    others = {package(module) for module in imported(ast.parse((ROOT / file).read_text()))} - {own, None}
    above = {other for other in others if LEVEL[other] >= LEVEL[own]}
    assert not above, f"{file} imports what is not below it"


def test_planning_imports_none_of_the_slow_libraries():
    slow = "{'torch', 'deepspeed', 'transformers'}"
    script = f"import sys, helpers.memory.predict, helpers.hardware; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
