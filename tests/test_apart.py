"""Files of tests that run in processes of their own, beside all other tests: the Triton kernels on the CPU, under the
interpreter and compiled for Hopper, and a sample of the zoo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(file for folder in ("interpret", "compiled", "zoo") for file in (HERE / folder).glob("test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_file(apart, file):
    done = apart[file].result()
    assert done.returncode == 0, done.stdout + done.stderr
