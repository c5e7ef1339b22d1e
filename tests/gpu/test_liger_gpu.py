"""A model to which Liger was applied first: its norms and activations stay Liger's, the rest is fused."""

import copy

import pytest
import torch

from tests.models import build, prompt
from tests.tolerance import LOGITS
from tinyfuse import optimize, quantize_

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("int8", [False, True])
def test_liger_applied_first(int8):
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    stock, _ = build("llama")
    stock.cuda()
    apply_liger_kernel_to_llama(model=stock, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    if int8:
        quantize_(stock)
    inputs = prompt(7, batch=2, padding=2, device="cuda")
    fast = optimize(copy.deepcopy(stock))
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits, rtol=LOGITS, atol=LOGITS)
    tokens = [model.generate(**inputs, max_new_tokens=6, do_sample=False) for model in (fast, stock)]
    assert torch.equal(*tokens)
    summary = fast._tinyfuse.report.summary
    assert all(summary[kind]["fused"] == summary[kind]["found"] > 0 for kind in ("linear", "attention", "rope"))
    assert "rms_norm" not in summary, "Liger's forwards were not there"
