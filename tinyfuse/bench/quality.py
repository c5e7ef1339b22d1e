"""What speed costs: perplexity, and the distance of a variant's predictions from the stock model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WINDOWS, WINDOW = 4, 256  # tokens of text: 4 windows of 256, each without context from the one before


@torch.no_grad()
def quality(
    models: dict[str, nn.Module],
    reference: nn.Module,
    windows: Sequence[Tensor],
    step: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """``{name: {"ppl", "kl", "top1"}}`` over ``windows`` of tokens [1, T], teacher-forced: all models see the same
    tokens. ``kl`` is the mean of KL(reference ‖ model) in nats over all positions, ``top1`` the share of positions at
    which both would pick the same token, ``ppl`` the exponential of the mean loss. Computed in fp32 from the logits."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    for ids in windows:
        expected = _log_probs(reference, ids)
        for name, model in models.items():
            got = expected if model is reference else _log_probs(model, ids)
            sums[name] += _compare(expected, got, ids)
        step()
    predicted = sum(ids.shape[1] - 1 for ids in windows)
    positions = sum(ids.shape[1] for ids in windows)
    return {
        name: {"ppl": math.exp(loss / predicted), "kl": kl / positions, "top1": same / positions}
        for name, (loss, kl, same) in ((name, total.tolist()) for name, total in sums.items())
    }


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)


def _compare(expected: Tensor, got: Tensor, ids: Tensor) -> Tensor:
    loss = -got[:-1].gather(1, ids[0, 1:, None]).sum()
    kl = torch.nn.functional.kl_div(got, expected, log_target=True, reduction="sum")
    same = (expected.argmax(-1) == got.argmax(-1)).sum()
    return torch.stack([loss.double(), kl.double(), same.double()]).cpu()
