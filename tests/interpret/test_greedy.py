import itertools

import pytest
import torch

from tinyfuse.kernels import _greedy
from tinyfuse.runtime.tail import Choice, Tail

INF, NAN = float("inf"), float("nan")
V, CHUNK = 75, 16


def make_state(batch, eos, banned):
    """Row 1 is finished from the start."""
    choice = Choice("greedy", torch.tensor(banned).long(), None, False)
    state = Tail(choice, torch.zeros(batch, 1, dtype=torch.long), 9, len(eos))
    unfinished = (torch.arange(batch) != 1).long()
    state.begin(choice, torch.arange(batch)[:, None], torch.tensor(eos).long(), torch.tensor(7), unfinished)
    return state


def check(steps, eos=(), banned=(), chunk=CHUNK):
    """The kernels leave what ``Tail.pick`` leaves on the CPU, after each of ``steps``, logits [batch, V]."""
    kernels, expected = (make_state(len(steps[0]), eos, banned) for _ in range(2))
    for logits in steps:
        held = logits.clone()
        end = kernels.pad, kernels.unfinished, kernels.written, kernels.token, kernels.ids
        _greedy.greedy(logits, kernels.banned, kernels.eos, *end, chunk=chunk)
        expected.pick(logits)
        for got, wanted in zip([kernels.token, *kernels.state], [expected.token, *expected.state], strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(logits.nan_to_num(5.0), held.nan_to_num(5.0))
    return expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 5])
def test_steps(batch, dtype):
    torch.manual_seed(0)
    check([torch.randn(batch, V).to(dtype) for _ in range(3)])


@pytest.mark.parametrize("size, chunk", [(1, 16), (16, 16), (17, 16), (1100, _greedy.CHUNK)])
def test_vocabulary(size, chunk):
    torch.manual_seed(0)
    check([torch.randn(2, size)], chunk=chunk)


def test_doubles_are_not_rounded():
    logits = torch.ones(1, V, dtype=torch.float64)
    logits[0, 40] += 1e-12
    assert check([logits]).token == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_first_of_equals(dtype):
    torch.manual_seed(0)
    steps = [torch.randint(3, (5, V)).to(dtype) for _ in range(2)]
    check([*steps, torch.zeros(5, V, dtype=dtype), torch.tensor([-0.0, 0.0]).to(dtype).repeat(5, 30)])


@pytest.mark.parametrize("places", [[(0,)], [(17,), (74,)], [(3, 60), (20, 21)]])
def test_nan_is_the_largest(places):
    torch.manual_seed(0)
    logits = torch.randn(len(places), V)
    logits[:, 9] = INF
    for row, place in zip(logits, places, strict=True):
        row[list(place)] = NAN
    assert check([logits]).token.flatten().tolist() == [place[0] for place in places]


def test_nothing_but_minus_infinity():
    logits = torch.full((2, V), -INF)
    logits[1, 33] = NAN
    assert check([logits]).token.tolist() == [[0], [33]]
    assert check([logits], banned=[0, 33]).token.tolist() == [[0], [0]]


@pytest.mark.parametrize("eos, banned", list(itertools.product([(), (2,), (2, 5, 70)], [(), (70,), (5, 70, 74)])))
def test_ends_and_bans(eos, banned):
    steps = torch.zeros(4, 5, V)
    for step, ids in enumerate([[70, 70, 3, 4, 1], [1, 2, 5, 74, 1], [74, 3, 5, 2, 1], [2, 1, 6, 8, 74]]):
        steps[step, range(5), ids] = 1
        steps[step, range(5), [(i + 2) % V for i in ids]] = 0.5
    state = check(list(steps), eos, banned)
    assert state.written == 5
    if eos:
        assert state.ids[1, 1:5].tolist() == [7] * 4 and state.unfinished.tolist()[4] == 1


@pytest.mark.parametrize("rows", [lambda x: x[:, -1], lambda x: x[:, 0, :V], lambda x: x.transpose(0, 2)[:V, 1].T])
def test_strides(rows):
    torch.manual_seed(0)
    check([rows(torch.randn(5, 3, V + 2)), rows(torch.randn(5, 3, V + 2))], eos=[4])


def test_rows_in_several_blocks():
    """2 rows of 300 chunks at a time."""
    torch.manual_seed(0)
    check([torch.randint(40, (5, 600)).float()], eos=[600], chunk=2)
