"""A second GPU: models on it, beside one on the first, and over both, with the first as the current device."""

import copy
import threading

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from tests.gpu.test_generate_gpu import FAMILIES, ONE, PADDED, build
from tinyfuse.api import optimize
from tinyfuse.kernels import linear
from tinyfuse.op import OPS
from tinyfuse.quantize import quantize_
from tinyfuse.runtime.captured import Captured

pytestmark = pytest.mark.gpu(gpus=2)
SECOND = torch.device("cuda", 1)


def same(fast, stock, prompt, **arguments):
    prompt = {name: value.to(stock.device) for name, value in prompt.items()}
    made = []
    for model in (stock, fast):
        torch.manual_seed(3)
        made.append(model.generate(**prompt, max_new_tokens=12, **arguments))
    assert torch.equal(*made)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_two_gpus(family, quantize):
    first = build(family)
    if quantize:
        quantize_(first)
    second = copy.deepcopy(first).to(SECOND)
    pairs = [(optimize(copy.deepcopy(model)), model) for model in (first, second)]
    for prompt in (ONE, PADDED, ONE):
        for fast, stock in pairs:
            same(fast, stock, prompt, do_sample=False)
            same(fast, stock, prompt, do_sample=True, top_k=9, repetition_penalty=1.2)
    for fast, _ in pairs:
        steps = [step for slot in fast._tinyfuse.pool.slots.values() for step in slot.steps.values()]
        runners = [runner for step in steps for runner in step.runners.values()]
        assert runners and all(isinstance(runner, Captured) for runner in runners)
    assert not any(op.broken for op in OPS.values())


def test_both_at_once():
    models = [build("llama").bfloat16(), build("llama").bfloat16().to(SECOND)]
    fast = [optimize(copy.deepcopy(model), quantize="int8") for model in models]
    expected = [model.generate(ONE["input_ids"].to(model.device), max_new_tokens=40, do_sample=False) for model in fast]
    made = [None, None]

    def run(index):
        for _ in range(5):
            ids = ONE["input_ids"].to(fast[index].device)
            made[index] = fast[index].generate(ids, max_new_tokens=40, do_sample=False)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(made[0], expected[0]) and torch.equal(made[1], expected[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_over_both(family):
    stock = build(family)
    layers = next(name for name, module in stock.named_modules() if isinstance(module, nn.ModuleList))
    leaves = [name for name, module in stock.named_modules() if not [*module.children()]]
    places = {name: 0 for name in leaves if not name.startswith(layers)} | {f"{layers}.0": 0, f"{layers}.1": 1}
    spread = dispatch_model(copy.deepcopy(stock), places, main_device=0)
    fast = optimize(dispatch_model(copy.deepcopy(stock), places, main_device=0))
    for prompt in (ONE, PADDED, ONE):
        same(fast, spread, prompt, do_sample=False)
        ids = {name: value.cuda() for name, value in prompt.items()}
        assert torch.allclose(fast(**ids).logits, spread(**ids).logits, atol=1e-4)
    assert not any(op.broken for op in OPS.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backend_on_the_second(family):
    stock = build(family).to(SECOND)
    compiled = torch.compile(copy.deepcopy(stock), backend="tinyfuse")
    for _ in range(5):  # from the third on a CUDA graph
        ids = torch.randint(0, 96, (2, 9), device=SECOND)
        assert torch.allclose(compiled(ids).logits, stock(ids).logits, atol=1e-4)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("rows", [1, 2, 4, 9, 40, 300])
def test_products_on_either(rows):
    for size in ((96, 64), (2048, 1024)):
        for device in (0, 1, 0, 1):
            weight = torch.randint(-127, 128, size, dtype=torch.int8, device=f"cuda:{device}")
            scale, x = torch.rand(size[0], device=weight.device) / 100, torch.randn(rows, size[1], device=weight.device)
            x = x.bfloat16()
            exact = x.double() @ (weight.double() * scale.double()[:, None]).T
            made = linear.OP(x, weight, scale, None, None)
            assert made.device == weight.device
            assert (made - exact).norm() <= 4e-3 * exact.norm()
    assert not any(op.broken for op in OPS.values())
