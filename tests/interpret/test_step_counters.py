from tests import row_ops
from tinyfuse.kernels import step_counters


def test_counters_next_to_each_other_and_apart():
    positions = row_ops.check_step_counters(step_counters.run_triton)
    assert all(position.data_ptr() % 16 == 0 for position in positions)
