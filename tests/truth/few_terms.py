"""How well one and two terms predict a feature where it is active, by how and on what they are chosen.

``python -m tests.truth.few_terms TEXT`` takes TinyStories, stories parted by ``<|endoftext|>`` (plain or
.gz), chooses terms of layer 3 of the model that ships on it, and measures them on the second half of
the stories that ship, which the model wrote. It writes `few_terms.json` beside this file; ``--page``
puts the table into demos/docs/saes.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.__main__ import environment
from tests.benchmarks.costs_page import between_marks
from tl_bilinear import FeatureInteractions, load_demo_model, load_demo_saes
from tl_bilinear.demo import load_demo_tokens
from tl_bilinear.features import FeatureRun

RESULTS = Path(__file__).with_name("few_terms.json")
PAGE = Path(__file__).parents[2] / "demos" / "docs" / "saes.md"
LAYER, FEATURES, LEAST, SEED, N_CTX = 3, 96, 100, 0, 256
ROWS = (1200, 4000)  # of N_CTX tokens


def text_rows(model: Any, path: Path, rows: int) -> torch.Tensor:
    """[rows, N_CTX] tokens of whole stories, one after the other, each behind a [BOS]."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    tokens: list[int] = []
    for story in filter(None, (story.strip().lower() for story in text.split("<|endoftext|>"))):
        tokens.append(model.tokenizer.bos_token_id)
        tokens += model.tokenizer.encode(story, add_special_tokens=False)
        if len(tokens) >= rows * N_CTX:
            return torch.tensor(tokens[: rows * N_CTX]).reshape(rows, N_CTX)
    raise ValueError(f"{path} has {len(tokens):,} tokens; {rows * N_CTX:,} are needed")


def measure(path: Path) -> dict[str, Any]:
    model = load_demo_model("cpu")
    saes = load_demo_saes(LAYER)
    features = FeatureInteractions(model, LAYER, saes["mlp_in"], saes["mlp_out"])
    stories = features.run(load_demo_tokens())
    half = len(stories) // 2
    first, second = stories[:half], stories[half:]
    counts = [part.low_rank_correlation(1).counts for part in (first, second)]
    enough = ((counts[0] >= LEAST) & (counts[1] >= LEAST)).nonzero()[:, 0]
    order = torch.randperm(len(enough), generator=torch.Generator().manual_seed(SEED))
    chosen = enough[order[:FEATURES]].tolist()
    rows: list[dict[str, Any]] = []

    def add(name: str, text: str, run: FeatureRun | None, **options: Any) -> None:
        found = second.low_rank_correlation(2, chosen, fit=run, **options)
        means = found.mean_active(LEAST).tolist()
        shares = [found.share_above(rank=k, min_active=LEAST) for k in (1, 2)]
        columns = {"r of 1": means[0], "r of 2": means[1], "above .75, 1": shares[0]}
        columns |= {"above .75, 2": shares[1]}
        tokens = 0 if run is None else int(run.mask.sum())
        rows.append({"terms": name, "chosen on": text, "tokens": tokens} | columns)
        print(rows[-1], flush=True)

    add("eigenvectors, by magnitude", "weights alone", None)
    written = "other stories of the model"
    add("eigenvectors, by covariance", written, first, by="covariance")
    add("eigenvectors in the metric of active tokens", written, first, metric="active")
    add("fitted", written, first, metric="active", by="fit")
    tokens = text_rows(model, path, max(ROWS))
    for count in ROWS:
        run = features.run(tokens[:count])
        add("fitted", "TinyStories", run, metric="active", by="fit")
    return {
        "layer": LAYER,
        "features": len(chosen),
        "of": len(enough),
        "least_active": LEAST,
        "measured_on": int(second.mask.sum()),
        "rows": rows,
        "environment": environment(),
    }


def shown(found: dict[str, Any]) -> str:
    """What the page shows: on what it was measured, and a table."""
    head = ["terms", "chosen on", "tokens", "r of 1", "r of 2", "above .75, 1", "above .75, 2"]
    lines = [
        f"{found['features']} features of layer {found['layer']} of the model that ships, drawn from "
        f"the {found['of']} that are",
        f"active on at least {found['least_active']} tokens of each half of its stories; judged on "
        f"the {found['measured_on']:,} tokens of the second:",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for row in found["rows"]:
        tokens = f"{row['tokens']:,}" if row["tokens"] else ""
        numbers = [f"{row[name]:.2f}" for name in head[3:]]
        lines.append(f"| {' | '.join([row['terms'], row['chosen on'], tokens, *numbers])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.text is not None:
        RESULTS.write_text(json.dumps(measure(options.text), indent=1) + "\n")
    if options.page:
        block = shown(json.loads(RESULTS.read_text()))
        PAGE.write_text(between_marks(PAGE.read_text(), "few terms", block))


if __name__ == "__main__":
    main()
