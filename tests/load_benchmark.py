"""Import a benchmark for tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_benchmark(name: str) -> ModuleType:
    """Import ``tests/benchmarks/NAME.py`` without adding it to ``sys.modules``.

    cloudpickle then sends its functions to ranks by value, as it does if the file is run as a script.
    """
    folder = Path(__file__).parent / "benchmarks"
    if str(folder) not in sys.path:  # benchmarks import one another
        sys.path.append(str(folder))
    path = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
