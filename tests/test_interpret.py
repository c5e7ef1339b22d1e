"""The Triton kernels on the CPU: each file of tests/interpret runs in a process of its own, under the interpreter."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("interpret").glob("test_*.py"))
SETTINGS = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs():
    """One file to a core at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_under_the_interpreter(runs, file):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout + done.stderr
