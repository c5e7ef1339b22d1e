"""What is checked of one model: the same results as stock transformers, and a reason for what was left alone."""

from __future__ import annotations

import copy
import logging
import signal
import time
import warnings
from collections.abc import Iterable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tests.models import prompt
from tests.tolerance import LOGITS, NARROW_LOGITS, error
from tests.zoo import encoders
from tests.zoo.build import build
from tests.zoo.results import (
    LENGTH,
    NEW_TOKENS,
    PADDING,
    Result,
    bits_differ,
    said,
    same,
    same_compiled,
    tokens_differ,
)
from tinyfuse.api import optimize, restore
from tinyfuse.quantize import quantize_
from tinyfuse.runtime import encoder_decoder, replay

LIMIT = 300  # seconds of a core for one type
CHOICES = {"topk", "sort", "argsort", "argmax"}


def logits_differ(expected: Tensor, made: Tensor) -> str | None:
    difference = error(made, expected.double())
    return None if difference < LOGITS else f"logits differ by {difference:.2g}"


class Exact:
    """The model in fp32, whose errors are small next to those of 16 bits."""

    def __init__(self, model: PreTrainedModel):
        self.model = copy.deepcopy(model).float()

    def differ(self, padding: int, expected: Tensor, made: Tensor) -> str | None:
        """Whether the tokens of ``made`` err by more than ``NARROW_LOGITS`` times what eager code errs.

        All tokens count, or the median token where the model chooses: a choice of experts or keys that a rounding turns
        round changes a few tokens wholly, others with each order of operations, and says nothing of either result.
        """
        with Operations() as seen:
            exact = logits(self.model, padding).double()
        of = torch.median if seen.names & CHOICES else torch.norm
        ours, theirs = (of((x.double() - exact).norm(dim=-1)).item() for x in (made, expected))
        return None if ours <= NARROW_LOGITS * theirs else f"logits err {ours / theirs:.2f} times what eager code errs"


class Operations(TorchDispatchMode):
    """The names of those that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def greedy(model: PreTrainedModel, padding: int) -> Tensor:
    inputs = prompt(LENGTH, batch=2, padding=padding, device=model.device)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


@torch.no_grad()
def logits(model: PreTrainedModel, padding: int) -> Tensor:
    """Of the tokens that are no padding."""
    inputs = prompt(LENGTH, batch=2, padding=padding, device=model.device)
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
    quantize_(plain, "int8", tied_heads=True)
    same(result, "int8", greedy, plain, optimize(copy.deepcopy(plain)), 0, tokens_differ)


def check_forward(model: PreTrainedModel, result: Result) -> None:
    same_compiled(result, "forward", logits, model, (0, PADDING), lambda padding: logits_differ)


def check_bfloat16(model: PreTrainedModel, result: Result) -> None:
    """Loaded in bf16, as users do: some weights and tables stay in fp32."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        narrow = type(model).from_pretrained(folder, dtype=torch.bfloat16).to(model.device)
    exact = Exact(narrow)
    same_compiled(result, "bfloat16", logits, narrow, (0, PADDING), lambda padding: partial(exact.differ, padding))


CHECKS = {
    "generate": check_generate,
    "int8": check_int8,
    "forward": check_forward,
    "bfloat16": check_bfloat16,
}


def check(model_type: str, names: Iterable[str] = CHECKS, device: str = "cpu") -> Result:
    """``model_type``: a causal type, or a name of ``encoders``."""
    result = Result(model_type)
    make, checks = (encoders.make, encoders.CHECKS) if model_type in encoders.NAMES else (build, CHECKS)
    try:
        model = make(model_type).to(device)
    except Exception as failure:
        result.stock["build"] = said(failure)
        return result
    for name in names:
        try:
            checks[name](model, result)
        except TimeoutError:
            raise
        except Exception as failure:
            result.wrong[name] = said(failure)
    return result


def run(model_type: str, names: Iterable[str], device: str, replays: bool) -> tuple[Result, float]:
    """In a process of its own: what was checked, and the seconds it took. ``replays``: on a CPU too, where a graph that
    is replayed runs on its buffers."""
    if replays:
        replay.DEVICES = encoder_decoder.DEVICES = ("cpu", "cuda")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    torch._dynamo.config.recompile_limit = 64
    signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    start = time.perf_counter()
    try:
        result = check(model_type, names, device)
    except Exception as failure:
        result = Result(model_type, wrong={"check": said(failure)})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        torch._dynamo.reset()
    return result, time.perf_counter() - start


def _late(*_: object) -> None:
    raise TimeoutError(f"not done in {LIMIT} s of a core")
