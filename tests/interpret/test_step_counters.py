import torch

from tinyfuse.kernels import step_counters


def test_counters_next_to_each_other_and_apart():
    together = torch.tensor([7, 7, 9, 1000]).unbind()
    apart = [torch.tensor(7), torch.tensor(8), torch.tensor(3)]
    for counters in (list(together), apart):
        before = [int(counter) for counter in counters]
        rings = [0, 4, 8, 0][: len(counters)]
        positions = step_counters.run_triton(counters, rings)
        want = [[value % ring if ring else value] for value, ring in zip(before, rings, strict=True)]
        assert [position.tolist() for position in positions] == want
        assert [int(counter) for counter in counters] == [value + 1 for value in before]
        assert all(position.data_ptr() % 16 == 0 for position in positions)
