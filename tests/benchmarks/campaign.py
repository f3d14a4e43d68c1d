"""Run every test marked ``campaign`` and record it: hundreds of injected faults, random networks, round trips.

    python tests/benchmarks/campaign.py [--results notebooks/results/campaign.json]

Takes about five minutes on two cores, so ``make test`` runs a small sample of the same tests instead.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from helpers.files import atomic_write
from helpers.hardware import describe_machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results" / "campaign.json"


def outcomes(junit: Path) -> list[dict[str, str | float]]:
    """Read pytest's XML report.

    Args:
        junit: The file that ``pytest --junitxml`` wrote.

    Returns:
        One entry per test: its name, "passed", "failed" or "skipped", and its seconds.
    """
    found: list[dict[str, str | float]] = []
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        found.append({"test": name, "outcome": outcome, "seconds": round(float(case.get("time", 0)), 1)})
    return found


def main() -> None:
    """Run the campaign, write its results, and end with pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "campaign.xml"
        command = [sys.executable, "-m", "pytest", "-m", "campaign", "-v", f"--junitxml={junit}"]
        status = subprocess.run(command, cwd=ROOT).returncode
        tests = outcomes(junit)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = {"machine": dataclasses.asdict(describe_machine()), "commit": commit, "tests": tests}
    with atomic_write(arguments.results) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    passed = sum(test["outcome"] == "passed" for test in tests)
    print(f"{passed} of {len(tests)} passed; written to {arguments.results}")
    sys.exit(status)


if __name__ == "__main__":
    main()
