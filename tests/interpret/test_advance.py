import pytest
import torch

from tinyfuse.kernels import _advance

# shape of a table and the dimension of its rows
TABLES = [((3, 9), 1), ((2, 1, 9, 700), 2), ((1, 1, 9, 33), 2), ((9, 2, 5), 0)]


@pytest.mark.parametrize("chosen", [(0,), (1, 0), (3, 1, 2)])
def test_buffers_follow_their_tables(chosen):
    tables = [torch.randint(0, 99, TABLES[i][0]).to((torch.long, torch.bool, torch.bfloat16)[i % 3]) for i in chosen]
    dims = [TABLES[i][1] for i in chosen]
    buffers = [table.select(dim, 0).unsqueeze(dim).clone() for table, dim in zip(tables, dims, strict=True)]
    row, done = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for at in range(1, 9):
        _advance.advance(tables, dims, buffers, row, done)
        assert row.item() == at
        for table, dim, buffer in zip(tables, dims, buffers, strict=True):
            assert torch.equal(buffer, table.select(dim, at).unsqueeze(dim))
