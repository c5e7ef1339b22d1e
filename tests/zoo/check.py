"""What is checked of one model: the same results as stock transformers, and a reason for what was left alone."""

from __future__ import annotations

import copy
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import prompt
from tests.tolerance import LOGITS, error
from tests.zoo import encoders
from tests.zoo.build import build
from tests.zoo.results import NEW_TOKENS, Result, bits_differ, said, same, tokens_differ
from tinyfuse.api import optimize, restore
from tinyfuse.quantize import quantize_
from tinyfuse.report import collect

LIMIT = 300  # seconds for one type
LENGTH, PADDING = 12, 3  # longer than a sliding window


def logits_differ(expected: Tensor, made: Tensor) -> str | None:
    difference = error(made, expected.double())
    return None if difference < LOGITS else f"logits differ by {difference:.2g}"


def greedy(model: PreTrainedModel, padding: int) -> Tensor:
    return model.generate(**prompt(LENGTH, batch=2, padding=padding), max_new_tokens=NEW_TOKENS, do_sample=False)


@torch.no_grad()
def logits(model: Callable[..., Any], padding: int) -> Tensor:
    """Of the tokens that are no padding."""
    inputs = prompt(LENGTH, batch=2, padding=padding)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def check_generate(model: PreTrainedModel, result: Result) -> None:
    """Twice: graphs are made at the first prompt and replayed at the second."""
    fast = optimize(copy.deepcopy(model))
    for padding in (0, PADDING, 0, PADDING):
        same(result, f"generate, padding {padding}", greedy, model, fast, padding, tokens_differ)
    result.note(fast._tinyfuse.report)
    result.fallbacks = list(fast._tinyfuse.fallbacks)
    restore(fast)
    same(result, "restore", logits, model, fast, PADDING, bits_differ)


def check_int8(model: PreTrainedModel, result: Result) -> None:
    plain = copy.deepcopy(model)
    quantize_(plain, "int8")
    same(result, "int8", greedy, plain, optimize(copy.deepcopy(plain)), 0, tokens_differ)


def check_forward(model: PreTrainedModel, result: Result) -> None:
    torch._dynamo.reset()
    with collect() as report:
        compiled = torch.compile(model, backend="tinyfuse")
        for padding in (0, PADDING):
            name = f"forward, padding {padding}"
            same(result, name, logits, model, compiled, padding, logits_differ)
            if name in result.wrong:
                _excuse(result, name, model, compiled, padding)
    result.note(report)


def _excuse(result: Result, name: str, model: PreTrainedModel, compiled: Any, padding: int) -> None:
    """Some code of transformers computes something else under ``torch.compile``, whatever the backend: then the graph
    run as it is counts."""
    graph = Result(result.model_type)
    same(graph, name, logits, torch.compile(model, backend="eager"), compiled, padding, logits_differ)
    if not graph.wrong and not graph.stock:
        result.stock[name] = f"compiled by any backend {result.wrong.pop(name)}"


CHECKS = {"generate": check_generate, "int8": check_int8, "forward": check_forward}


def check(model_type: str, names: Iterable[str] = CHECKS) -> Result:
    """``model_type``: a causal type, or a name of ``encoders``."""
    result = Result(model_type)
    make, checks = (encoders.make, encoders.CHECKS) if model_type in encoders.NAMES else (build, CHECKS)
    try:
        model = make(model_type)
    except Exception as failure:
        result.stock["build"] = said(failure)
        return result
    for name in names:
        checks[name](model, result)
    return result


def run(model_type: str, names: Iterable[str]) -> tuple[Result, float]:
    """In a process of its own: what was checked, and the seconds it took."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch._dynamo.config.recompile_limit = 64
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(LIMIT)
    start = time.perf_counter()
    try:
        result = check(model_type, names)
    except Exception as failure:
        result = Result(model_type, wrong={"check": said(failure)})
    finally:
        signal.alarm(0)
        torch._dynamo.reset()
    return result, time.perf_counter() - start


def _late(*_: object) -> None:
    raise TimeoutError(f"not done in {LIMIT} s")
