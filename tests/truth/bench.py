"""What each way of ranking finds in planted models, and what it finds where there is nothing.

``python -m tests.truth.bench`` runs all and writes `results.json` beside this file.
"""

import json
import time
from pathlib import Path

import torch

from tests.truth import models
from tl_bilinear.features.chance import discoveries, p_values, pair_scores, pursue_pairs

RATE = 0.01
RESULTS = Path(__file__).with_name("results.json")
ORDERS = ("coefficient", "on text", "where active")
NULLS = ("dictionary", "neurons")
METHODS = (*NULLS, "pursuit")


def rank(case):
    """For each order all pairs, best first; for each null, the discoveries."""
    n = len(case.directions)
    rows, columns = torch.triu_indices(n, n)
    scores = {
        null: pair_scores(case.layer, case.directions, null, draws=110, seed=0) for null in NULLS
    }
    coefficients = scores["neurons"].coefficients[rows, columns]
    form = case.layer.interaction()[0].fold(case.directions).dense()
    value = torch.einsum("tb,bc,tc->t", case.z, form, case.z)
    on = value > value.quantile(0.95)
    met = {"on text": case.z, "where active": case.z[on]}
    keys = {"coefficient": coefficients}
    for name, z in met.items():
        keys[name] = coefficients * (z.T @ z / len(z))[rows, columns]
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    ordered = {name: key.abs().argsort(descending=True) for name, key in keys.items()}
    found = {}
    for null in NULLS:
        p = p_values(scores[null].z[rows, columns], scores[null].null)
        found[null] = {pairs[i] for i in discoveries(p, RATE).nonzero()[:, 0].tolist()}
    form = case.layer.interaction()[0].dense()
    taken, _, _ = pursue_pairs(form, case.directions, 8, rate=RATE, draws=100)
    found["pursuit"] = set(map(tuple, taken.tolist()))
    return {name: [pairs[i] for i in order[:20].tolist()] for name, order in ordered.items()}, found


def related(pair, truth, cosines):
    """Whether a pair resembles a true one: what it reads is partly the same."""
    return any(
        min(cosines[pair[0], a], cosines[pair[1], b]) > 0.3
        or min(cosines[pair[0], b], cosines[pair[1], a]) > 0.3
        for a, b in truth
    )


def measure(case):
    tops, found = rank(case)
    truth, row = case.truth, dict(case.name)
    cosines = (case.directions @ case.directions.T).abs()
    for order in ORDERS:
        if truth:
            row[f"power, {order}"] = len(truth & set(tops[order][: len(truth)])) / len(truth)
    for null in METHODS:
        row[f"discoveries, {null}"] = len(found[null])
        if truth:
            row[f"power, {null}"] = len(truth & found[null]) / len(truth)
            wrong = found[null] - truth
            row[f"false, {null}"] = len(wrong) / max(1, len(found[null]))
            far = [pair for pair in wrong if not related(pair, truth, cosines)]
            row[f"false and unrelated, {null}"] = len(far) / max(1, len(found[null]))
    return row


def run(few=False):
    torch.set_num_threads(1)
    planted = [measure(models.planted(*setting)) for setting in models.all_planted(few)]
    null = [measure(models.null(*setting)) for setting in models.all_null(few)]
    return planted, null


def mean(rows, key):
    return sum(float(row[key]) for row in rows) / len(rows)


def summary(planted, null):
    """Means over the models, and by what they are made of."""
    keys = [key for key in planted[0] if key.startswith(("power", "false"))]
    found = {"planted": len(planted), "null": len(null), "rate": RATE}
    found["all"] = {key: mean(planted, key) for key in keys}
    for name in ("kind", "dictionary", "noise"):
        found[f"by {name}"] = {
            str(value): {key: mean([r for r in planted if r[name] == value], key) for key in keys}
            for value in dict.fromkeys(row[name] for row in planted)
        }
    found["null models with a discovery"] = {
        which: {
            method: mean(
                [{"x": row[f"discoveries, {method}"] > 0} for row in null if row["null"] == which],
                "x",
            )
            for method in METHODS
        }
        for which in dict.fromkeys(row["null"] for row in null)
    }
    return found


def main():
    start = time.monotonic()
    planted, null = run()
    found = summary(planted, null) | {"seconds": round(time.monotonic() - start, 1)}
    stored = {"summary": found, "planted": planted, "null": null}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
