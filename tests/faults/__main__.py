"""Count the campaign's cases by class, and show what is not clear: ``python -m tests.faults``."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.faults import tables
from tests.faults.campaign import outcome

torch.set_num_threads(1)
found: Counter[str] = Counter()
for case in tables.all_cases():
    if len(sys.argv) > 1 and not case.name.startswith(sys.argv[1]):
        continue
    with tempfile.TemporaryDirectory() as folder:
        kind, line = outcome(case, Path(folder))
    found[kind] += 1
    if kind != "clear":
        print(f"{kind:11} {case.name}: {line[:300]}")
print(dict(found))
