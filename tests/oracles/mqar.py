"""How often each place asks in multi-query associative recall, by numpy's weighted choice without replacement, as the task's authors draw their gaps.

Run: python tests/oracles/mqar.py. What it prints stands in train/src/tasks/tests.rs.
"""

import numpy as np

for pairs, length, a in [(4, 64, 0.01), (8, 64, 0.01), (4, 32, 1.0)]:
    space = (length - 2 * pairs) // 2
    p = a * np.arange(1, space + 1) ** (a - 1)
    p /= p.sum()
    rng = np.random.RandomState(0)
    n = 200_000
    used, first = np.zeros(space), np.zeros(space)
    for _ in range(n):
        gaps = rng.choice(np.arange(space), replace=False, p=p, size=pairs)
        used[gaps] += 1
        first[gaps[0]] += 1
    print(pairs, length, a, "asks:", np.round(used / n, 3).tolist()[:6], "first key's:", np.round(first / n, 3).tolist()[:4])
