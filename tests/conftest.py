"""Tests marked ``gpu`` are deselected where CUDA devices are too few; ``test_apart.py`` runs beside the others."""

import gc
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tinyfuse import fallback

collect_ignore = ["interpret", "compiled", "zoo"]  # run by test_apart.py
APART = "test_apart"


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem == APART)  # by then the results are there
    found = torch.cuda.device_count()
    marks = [(item, item.get_closest_marker("gpu")) for item in items]
    without = [item for item, mark in marks if mark and mark.kwargs.get("gpus", 1) > found]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def pytest_collection_finish():
    gc.freeze()  # what the imports made is not looked through again and again: a fifteenth of the time


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_graph_fails_to_compile():
    """A graph that the backend fails to compile runs as stock's, and a call that cannot be recorded is traced, with the
    same results: no other test would notice."""
    before = Counter(fallback.seen)
    yield
    failed = [reason for (where, reason) in fallback.seen - before if where == "backend" and "failed" in reason]
    errors = [re.match(r"traced by Dynamo: (\w+): ", reason) for _, reason in fallback.seen - before]
    failed += [error.string for error in errors if error and error[1] != "GuardOnDataDependentSymNode"]
    assert not failed


@pytest.fixture
def poisoned():
    """Random numbers from a seed; uninitialised memory holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def apart(request):
    """What each file of ``test_apart.py`` gives, one file to a core but for one core, from the first test on."""
    from tests.test_apart import run

    files = [item.callspec.params["file"] for item in request.session.items if item.path.stem == APART]
    pool = ThreadPoolExecutor(max(1, os.cpu_count() - 1))
    yield {file: pool.submit(run, file) for file in files}
    pool.shutdown(cancel_futures=True)
