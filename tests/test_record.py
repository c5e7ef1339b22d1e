"""Recorded graphs: equal to the code they were recorded from, at every size, and given up where the model changes."""

import copy
import dataclasses
import enum
import functools
import gc
import operator
import os
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_generate import SIZE
from tinyfuse.api import optimize
from tinyfuse.graph.record import Declined, Given, record
from tinyfuse.quantize import quantize_
from tinyfuse.runtime import recorded
from tinyfuse.runtime.rehearsal import rehearsal, unchanged


def replay(graph, recording, given):
    sizes = [given[name].shape[dim] for name, dim in recording.symbols]
    run = GraphModule(nn.Module(), graph)
    return recording.rebuild(run(*sizes, *given.values(), *recording.constants))


def mixed(x, mask, state):
    """Operators from both sides, sizes as numbers, several results, a write to an input, views, a constant."""
    length = x.shape[1]
    state.add_(1)
    low, high = (2 - x / 3).chunk(2, dim=-1)
    y = torch.cat([high, low], -1) @ torch.full((4, length), 0.5)
    y[:, 0] = -1
    y += x.new_ones(1, length, 1) * (length // 2 - 3)
    top, where = y.max(dim=-1, keepdim=True)
    return {"y": torch.where(mask, top.expand(-1, -1, 2), 0.25).T.mT, "where": where, "state": state, "n": (1, None)}


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_a_recording_is_the_code_at_every_size():
    def sample(length):
        torch.manual_seed(length)
        return {"x": torch.randn(2, length, 4), "mask": torch.rand(2, length, 1) < 0.5, "state": torch.zeros(3)}

    first = sample(9)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    given = {"x": Given(first["x"], (1,)), "mask": Given(first["mask"], (1,)), "state": Given(first["state"])}
    graph, recording = record(lambda fakes: mixed(**fakes), given, {})
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    for length in (9, 5, 14):
        given, same = sample(length), sample(length)
        assert recording.holds(given)
        made, expected = replay(graph, recording, given), mixed(**same)
        assert made["n"] == (1, None)
        for name in ("y", "where", "state"):
            assert torch.equal(made[name], expected[name])
        assert torch.equal(given["state"], torch.ones(3))


def test_calls_that_look_alike_are_each_recorded():
    def repeated(x):
        first, second = x * 3, x * 3
        first += 1
        left, right = x.chunk(2, -1), (x - 5).chunk(2, -1)
        right[0].mul_(2)
        return {"y": first - second + torch.cat([left[1], right[0]], -1), "z": x[:, :1] - x[:, 1:2]}

    graph, recording = record(lambda fakes: repeated(**fakes), {"x": Given(torch.randn(2, 9, 4), (1,))}, {})
    for length in (9, 5):
        x = torch.randn(2, length, 4)
        made, expected = replay(graph, recording, {"x": x}), repeated(x)
        assert all(torch.equal(made[name], expected[name]) for name in expected)


ALONE = ["neg", "invert", "abs"]
IN_PLACE = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"]
BINARY = [*(name[1:] for name in IN_PLACE), "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"]


@pytest.mark.parametrize("name", [*ALONE, *IN_PLACE, *BINARY, "matmul"])
def test_every_operator_is_recorded(name):
    """With a tensor on either side and on both."""
    apply = getattr(operator, name + "_" * (name in ("and", "or")))
    dtype = torch.float32 if name.endswith("truediv") else torch.long
    x, y = torch.tensor([[5, 7], [6, 4]], dtype=dtype), torch.tensor([[1, 2], [3, 1]], dtype=dtype)
    calls = [lambda x, y: apply(x.clone(), y)]
    if name in ALONE:
        calls = [lambda x, y: apply(x)]
    elif name != "matmul":
        calls += [lambda x, y: apply(x.clone(), 3), *([lambda x, y: apply(2, y)] if name in BINARY else [])]
    for call in calls:
        graph, recording = record(lambda fakes, call=call: call(**fakes), {"x": Given(x), "y": Given(y)}, {})
        assert torch.equal(replay(graph, recording, {"x": x, "y": y}), call(x, y))


class Kind(enum.IntEnum):
    LAST = -1


def test_constants_that_code_cannot_spell():
    """Numbers of NumPy and of enumerations become plain ones; of other things there is no recording."""

    def call(given):
        return {"out": (given["x"] * np.float64(0.5) / np.sqrt(9.0) + np.int64(2)).sum(Kind.LAST)}

    given = {"x": torch.randn(3, 4)}
    graph, recording = record(call, {"x": Given(given["x"])}, {})
    assert torch.equal(replay(graph, recording, given)["out"], call(given)["out"])


class Rounding(enum.StrEnum):
    DOWN = "floor"


@pytest.mark.parametrize(
    "use", [lambda x: x[np.array([1])], lambda x: torch.div(x, 2, rounding_mode=Rounding.DOWN)], ids=["array", "text"]
)
def test_other_arguments_are_no_recording(use):
    with pytest.raises(Declined, match="is given a"):
        record(lambda fakes: {"out": use(fakes["x"])}, {"x": Given(torch.randn(3))}, {})


def test_a_function_without_a_name_is_no_recording():
    def scale(x, by):
        if has_torch_function_unary(x):
            return handle_torch_function(scale, (x,), x, by)
        return x * by

    given = {"x": torch.randn(3)}
    with pytest.raises(Declined, match="cannot be imported"):
        record(lambda fakes: {"out": scale(fakes["x"], 2)}, {"x": Given(given["x"])}, {})


@torch.library.custom_op("tinyfuse_tests::bump", mutates_args=("x",))
def bump(x: torch.Tensor) -> None:
    x.add_(1)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: bump(x),
        lambda x: torch.ops.tinyfuse_tests.bump(x),
        lambda x: torch.ops.aten.add_.Tensor(x, 2),
        lambda x: torch.add(x, 3, out=x),
        lambda x: torch.nn.functional.relu(x, inplace=True),
        lambda x: torch.nn.functional.relu(x, True),
        lambda x: x.__setitem__(0, 7.0),
        lambda x: x[1:].mul_(2),
        lambda x: torch._foreach_add_([x], 1),
        lambda x: x.copy_(torch.arange(4.0)),
    ],
)
def test_every_write_is_recorded(write):
    def call(fakes):
        y = fakes["x"] * 1
        write(fakes["x"])
        write(y)
        return y + fakes["x"]

    start = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    graph, recording = record(call, {"x": Given(start.clone())}, {})
    made, same = {"x": start.clone()}, {"x": start.clone()}
    assert torch.equal(replay(graph, recording, made), call(same))
    assert torch.equal(made["x"], same["x"])


def test_a_size_that_decides_is_a_guard():
    def call(fakes):
        return fakes["x"] * 2 if fakes["x"].shape[0] > 6 else fakes["x"] - 1

    _, recording = record(call, {"x": Given(torch.ones(5), (0,))}, {})
    assert recording.holds({"x": torch.ones(6)}) and not recording.holds({"x": torch.ones(7)})


def test_sizes_that_were_equal_by_chance_need_not_stay_equal():
    given = {"x": Given(torch.ones(5), (0,)), "y": Given(torch.ones(5), (0,))}
    _, recording = record(lambda fakes: fakes["x"] + fakes["y"], given, {})
    assert recording.holds({"x": torch.ones(8), "y": torch.ones(8)})
    assert not recording.holds({"x": torch.ones(8), "y": torch.ones(9)})


def swallowed(total):
    try:
        return total().item()
    except Exception:
        return 0


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x * 2 if x.sum() > 0 else x,
        lambda x: x * x.max().item(),
        lambda x: x * swallowed(x.sum),
        lambda x: x + torch.tensor(x.tolist()),
        lambda x: x + float(x[0]),
        lambda x: x[x.nonzero().numpy()],
    ],
)
def test_a_value_that_decides_is_no_recording(look):
    with pytest.raises(Declined, match="value of a tensor"):
        record(lambda fakes: look(fakes["x"]), {"x": Given(torch.ones(3))}, {})


def llama(layers=2):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"num_hidden_layers": layers, "initializer_range": 0.2})).eval()
    model.generation_config.eos_token_id = None
    return model


def replace_a_module(model):
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)


def replace_a_weight(model):
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())


def move_a_weight(model):
    model.lm_head.weight.data = -model.lm_head.weight.data


def patch_a_function(model):
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: stock(q, k, cos, -sin)
    return lambda: setattr(modeling_llama, "apply_rotary_pos_emb", stock)


def hook_a_module(model):
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 2)


def set_an_attribute(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 1.0


def set_the_configuration(model):
    model.config._attn_implementation = "eager"


CHANGES = [
    replace_a_module, replace_a_weight, move_a_weight, patch_a_function, hook_a_module, set_an_attribute,
    set_the_configuration,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_recorded_anew(change):
    inputs = {"input_ids": torch.tensor([[5, 17, 33, 2, 8, 61]]), "max_new_tokens": 8, "do_sample": False}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    model, stock = optimize(llama()), llama()
    before = model.generate(**inputs).logits
    undo = change(model)
    change(stock) if undo is None else None
    try:
        after, expected = model.generate(**inputs).logits, stock.generate(**inputs).logits
    finally:
        undo() if undo else None
    assert torch.allclose(torch.stack(after), torch.stack(expected), atol=1e-4)
    if change is not set_the_configuration:
        assert not torch.allclose(torch.stack(after), torch.stack(before), atol=1e-2)
    assert change is hook_a_module or model._tinyfuse.recordings.version == 2


def test_the_memory_of_a_tensor_that_is_no_buffer_may_change():
    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.__dict__["shift"] = inner, torch.zeros(32)

        def forward(self, x):
            return self.inner(x) + self.shift

    fast, stock = llama(), llama()
    for model in (fast, stock):
        model.model.layers[0].mlp = Shifted(model.model.layers[0].mlp)
    optimize(fast)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for value in (0.0, 2.0):
        for model in (fast, stock):
            model.model.layers[0].mlp.shift.set_(torch.full((32,), value))
        pair = [torch.stack(m.generate(torch.tensor([[5, 17, 33, 2, 8, 61]]), **options).logits) for m in (fast, stock)]
        assert torch.allclose(*pair, atol=1e-4)
    assert fast._tinyfuse.recordings.version == 2


FACTOR, FACTORS = 1.0, {"held": {"deep": 1.0}}


def by_factor(x):
    return x * FACTOR


@dataclasses.dataclass
class Options:
    factor: float = 1.0
    table: dict = dataclasses.field(default_factory=lambda: {"deep": {"deeper": 1.0}})
    shift: torch.Tensor | None = None


class Slotted:
    __slots__ = ("factor",)


class Scaled(nn.Module):
    """Multiplies by what its code finds in many places."""

    factor = 1.0

    def __init__(self, inner):
        super().__init__()
        self.inner, self.options, self.nested, self.slotted = inner, Options(), ({"deep": 1.0},), Slotted()
        self.slotted.factor, factor = 1.0, 1.0

        def set_cell(value):
            nonlocal factor
            factor = value

        self.closure, self.set_cell = (lambda x: x * factor), set_cell
        self.partial = functools.partial(lambda factors, x: x * factors["deep"], {"deep": 1.0})

    def helper(self, x, factor=1.0):
        return x * self.factor * factor * float(os.environ.get("TINYFUSE_TEST_FACTOR", "1"))

    def forward(self, x):
        y = self.partial(self.closure(by_factor(self.helper(self.inner(x)))))
        y = y * self.options.factor * self.options.table["deep"]["deeper"]
        y = y * self.nested[0]["deep"] * self.slotted.factor * FACTORS["held"]["deep"]
        return y if self.options.shift is None else y + self.options.shift


PLACES = {
    "global of a helper": lambda m, patch: patch.setattr(f"{__name__}.FACTOR", 2.0),
    "container of a global": lambda m, patch: patch.setitem(FACTORS["held"], "deep", 2.0),
    "class attribute": lambda m, patch: patch.setattr(Scaled, "factor", 2.0),
    "method of the class": lambda m, patch: patch.setattr(Scaled, "helper", lambda self, x: 2 * x),
    "default": lambda m, patch: patch.setattr(Scaled.helper, "__defaults__", (2.0,)),
    "environment": lambda m, patch: patch.setenv("TINYFUSE_TEST_FACTOR", "2"),
    "object": lambda m, patch: patch.setattr(m.options, "factor", 2.0),
    "container of an object": lambda m, patch: patch.setitem(m.options.table["deep"], "deeper", 2.0),
    "tensor of an object": lambda m, patch: patch.setattr(m.options, "shift", torch.ones(32)),
    "container of a tuple": lambda m, patch: patch.setitem(m.nested[0], "deep", 2.0),
    "slot": lambda m, patch: patch.setattr(m.slotted, "factor", 2.0),
    "closure": lambda m, patch: m.set_cell(2.0),
    "partial": lambda m, patch: patch.setitem(m.partial.args[0], "deep", 2.0),
}


@pytest.fixture(scope="module")
def scaled():
    models = llama(1), llama(1)
    for model in models:
        model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    return optimize(models[0]), models[1]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_the_code_reads_may_change_wherever_it_is(scaled, place, monkeypatch):
    inputs = {"input_ids": torch.tensor([[5, 17, 33, 2, 8, 61]]), "max_new_tokens": 3, "do_sample": False}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    before = scaled[0].generate(**inputs).logits
    version = scaled[0]._tinyfuse.recordings.version
    scaled[0].generate(**inputs)
    assert scaled[0]._tinyfuse.recordings.version == version
    for model in scaled:
        place(model.model.layers[0].mlp, monkeypatch)
    after, expected = (model.generate(**inputs).logits for model in scaled)
    assert torch.allclose(torch.stack(after), torch.stack(expected), atol=1e-4)
    assert not torch.allclose(torch.stack(after), torch.stack(before), atol=1e-3)


class Holds(nn.Module):
    """Holds a tensor that every call gets anew, as the offsets of positions that some models prepare for a prompt."""

    def __init__(self, inner, use):
        super().__init__()
        self.inner, self.use, self.held = inner, use, torch.ones(1)

    def forward(self, x):
        return self.inner(x) * (1 if self.held is None else self.use(self.held))


@pytest.mark.parametrize("use", [lambda held: held[-1], len, lambda held: 2], ids=["value", "size", "none"])
def test_a_tensor_that_each_call_gets_anew(use):
    """That is a change of the model if the code has looked at it."""
    inputs = {"input_ids": torch.tensor([[5, 17, 33, 2, 8, 61]]), "max_new_tokens": 3, "do_sample": False}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    models = optimize(llama(1)), llama(1)
    for model in models:
        model.model.layers[0].mlp = Holds(model.model.layers[0].mlp, use)
    versions = []
    for held in (torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0]), None):
        for model in models:
            model.model.layers[0].mlp.held = held
        made, expected = (torch.stack(model.generate(**inputs).logits) for model in models)
        assert torch.allclose(made, expected, atol=1e-4)
        versions.append(models[0]._tinyfuse.recordings.version)
    looked = use(torch.zeros(5)) != 2
    assert (versions[3] > versions[0]) == looked and versions[4] > versions[3]


CALLS = []


@functools.lru_cache
def remembered(size):
    return torch.arange(size).float().cos()


class Leaves(nn.Module):
    """Leaves traces outside of tensors, or draws what no graph draws."""

    calls = 0

    def __init__(self, inner, trace):
        super().__init__()
        self.inner, self.trace, self.options = inner, trace, Options()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return self.inner(x) * getattr(self, self.trace)()

    def on_an_object(self):
        self.options.factor += 0.1
        return self.options.factor

    def on_the_class(self):
        type(self).calls += 1  # Dynamo would read the old number under self
        return 2

    def in_a_global(self):
        CALLS.append(1)
        return 1 + 0.1 * len(CALLS)

    def in_a_function(self):
        return remembered(32)

    def in_a_buffer(self):
        self.count += 1
        return 2

    def of_python(self):
        return random.random()

    def of_numpy(self):
        return float(np.random.rand())

    def of_torch(self):
        return torch.rand(1) + F.dropout(torch.ones(32), 0.5, training=True)

    def of_a_seed(self):
        torch.manual_seed(7)
        return torch.rand(1)


TRACES = [name for name in vars(Leaves) if "_" in name.strip("_")]
REPEATED = {"in_a_function", "in_a_buffer", "of_torch"}  # by a graph


def state(module):
    numbers = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()
    kept = module.calls, len(CALLS), module.options.factor, module.count.item(), remembered.cache_info().currsize
    return kept, numbers


@pytest.mark.parametrize("trace", TRACES)
def test_what_a_rehearsal_leaves_is_undone(trace):
    module, x = Leaves(nn.Identity(), trace), torch.ones(32)
    remembered.cache_clear()
    before = state(module)
    with rehearsal(module) as left:
        module(x)
    assert state(module) == before and bool(left) == (trace not in REPEATED)
    if left:
        with pytest.raises(Declined), unchanged(module):
            module(x)
        assert state(module) == before


@pytest.mark.parametrize("trace", ["on_an_object", *sorted(REPEATED)])
def test_traces_that_a_forward_leaves_are_those_of_its_calls(trace):
    made = []
    for fast in (False, True):
        model = llama(1)
        left = model.model.layers[0].mlp = Leaves(model.model.layers[0].mlp, trace)
        optimize(model) if fast else None
        remembered.cache_clear()
        torch.manual_seed(0)
        options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        calls = [model.generate(torch.tensor([[5, 17, 33, 2, 8, 61]]), **options).logits for _ in range(2)]
        assert type(remembered(32)) is torch.Tensor
        made.append((torch.stack(sum(calls, ())), (left.options.factor, left.count.item(), torch.rand(1).item())))
    assert torch.allclose(made[0][0], made[1][0], atol=1e-4)
    assert made[0][1] == made[1][1]


def test_a_model_that_changes_before_each_call_is_not_recorded_each_time(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_CHANGES", 1)
    fast, stock = optimize(llama(1)), llama(1)
    recordings = fast._tinyfuse.recordings
    for scaling in (0.1, 0.2, 0.3, 0.3):
        for model in (fast, stock):
            model.model.layers[0].self_attn.scaling = scaling
        made, expected = (
            m.generate(torch.tensor([[5, 17, 33]]), max_new_tokens=4, do_sample=False) for m in (fast, stock)
        )
        assert torch.equal(made, expected)
        assert bool(recordings.compiled) == (recordings.changes <= 1)
    assert recordings.changes == 0 and recordings.version == 3


def test_a_model_that_writes_its_attributes_is_left_to_dynamo():
    model = llama()

    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls, self.last = inner, 0, None

        def forward(self, x):
            self.calls, self.last = self.calls + 1, x
            return self.inner(x)

    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    stock = copy.deepcopy(model)
    ids = torch.tensor([[5, 17, 33, 2, 8, 61]])
    optimize(model)
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, stock.generate(ids, max_new_tokens=4, do_sample=False))
    assert set(model._tinyfuse.recordings.declined.values()) == {"the forward changes the model's attributes"}
    assert type(model.model.layers[0].mlp.last) is torch.Tensor


def test_quantising_an_optimised_model_frees_the_float_weights():
    ids = torch.tensor([[5, 17, 33, 2, 8, 61]])
    model, stock = optimize(llama()), llama()
    model.generate(ids, max_new_tokens=4, do_sample=False)
    weights = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.model.layers]
    quantize_(model)
    gc.collect()
    assert all(weight() is None for weight in weights)
    quantize_(stock)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
