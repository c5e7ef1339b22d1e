"""Tests marked ``gpu`` are deselected where there is no CUDA device."""

import torch

collect_ignore = ["interpret"]  # collected under TRITON_INTERPRET=1 by test_interpret.py


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
