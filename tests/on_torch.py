"""Run the tests on another version of PyTorch.

    python tests/on_torch.py 2.12.1                  # all default tests
    python tests/on_torch.py 2.12.1 tests/test_ties.py -x
    python tests/on_torch.py 2.14.1 --python path/to/python   # an interpreter that has this version and the test extras

Makes an environment in a temporary folder, installs that PyTorch and what the package and its tests need beside it,
runs pytest there, prints the result in one line, and deletes the environment. What pip finds decides which build it is;
one with CUDA takes 6 GB for as long. Other arguments go to pytest. Results are in docs/versions.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import tomllib

REPOSITORY = Path(__file__).resolve().parent.parent


def requirements() -> list[str]:
    """What the package and its tests need, without PyTorch itself."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *extras["tour"], *extras["test"]]
    return [requirement for requirement in every if not requirement.startswith("torch")]


def install(folder: Path, version: str) -> Path:
    """The interpreter of a new environment with that PyTorch."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={version}", *requirements()], check=True)
    return python


def run_tests(python: Path, version: str, arguments: Sequence[str]) -> int:
    """Run pytest by ``python`` and print its last line again, with the version; pytest's exit code."""
    installed = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if installed.split("+")[0] != version:
        raise SystemExit(f"{python} has torch {installed}, not {version}")
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or ("-n", "2"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    last = ""
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    print(f"\ntorch {installed}, {date.today()}: {last}")
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="run the tests on a version of PyTorch")
    parser.add_argument("version", help="such as 2.12.1")
    parser.add_argument("--python", type=Path, help="an interpreter that has this version and the test extras already")
    options, arguments = parser.parse_known_args()
    if options.python is not None:
        return run_tests(options.python, options.version, arguments)
    with tempfile.TemporaryDirectory(prefix="functrans-torch-") as folder:
        return run_tests(install(Path(folder), options.version), options.version, arguments)


if __name__ == "__main__":
    sys.exit(main())
