"""Which examples share a row."""

import chex
import numpy as np


def best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
  """Packs items in the given order, each into the fullest row that takes it.

  A bit set of the free space in open rows finds that row in O(1).

  Args:
    sizes: [n] ints, each in 1..length.
    length: of a row.

  Returns:
    Rows of item indices; every item exactly once.
  """
  chex.assert_rank(sizes, 1)
  rows: list[list[int]] = []
  open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # By free space.
  available = 0  # Bit f is set if open_rows[f] is not empty.
  for item, size in enumerate(sizes.tolist()):
    fitting = available >> size
    if fitting:
      free = size + (fitting & -fitting).bit_length() - 1
      row = open_rows[free].pop()
      if not open_rows[free]:
        available ^= 1 << free
    else:
      free, row = length, len(rows)
      rows.append([])
    rows[row].append(item)
    open_rows[free - size].append(row)
    available |= 1 << (free - size)
  return rows
