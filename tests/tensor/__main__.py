"""Count the outcomes of hard spectra: ``python -m tests.tensor FIRST LAST COUNTS.jsonl``, resumable.

One line a case: `wrong` where a statement does not hold, `exception` where the solver raised; `held` and
`not converged` are cases whose every statement holds, with and without all matrices converged.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from tests.tensor.test_campaign import run

torch.set_num_threads(1)
first, last, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
done = {line["seed"] for line in lines}
with path.open("a") as file:
    for seed in range(first, last):
        if seed in done:
            continue
        try:
            _, faults, found = run(seed)
            good = "held" if found.converged.all() else "not converged"
            line = {"seed": seed, "outcome": "wrong" if faults else good, "said": faults[:3]}
        except Exception as error:
            line = {"seed": seed, "outcome": "exception", "said": [repr(error)]}
        lines.append(line)
        print(json.dumps(line), file=file, flush=True)
print(dict(Counter(line["outcome"] for line in lines)))
for line in lines:
    if line["said"]:
        print(line)
