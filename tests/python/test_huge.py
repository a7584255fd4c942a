"""Arrays of more than 2^31 elements: no index is ever 32 bits wide."""

from __future__ import annotations

import numpy as np

from abjure import refuse

WIDTH = 4096
ROWS = (1 << 31) // WIDTH + 2


def test_the_last_row_of_a_huge_array_is_reached():
    x = np.zeros((ROWS, WIDTH), np.float16)  # 4.3 GB, mapped as it is touched
    assert x.size > 1 << 31
    q = np.zeros(WIDTH)
    q[5] = 3.0
    x[0] = x[ROWS // 2] = x[-1] = 1.0
    refuse.ablate_(x, q)
    expected = np.ones(WIDTH, np.float16)
    expected[5] = 0.0
    for row in (0, ROWS // 2, ROWS - 1):
        np.testing.assert_array_equal(x[row], expected)
    assert not x[1].any()
