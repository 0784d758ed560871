"""An input feature that lowers its own token: what the layer does without the pair of it with itself.

``python -m tests.truth.brake`` takes feature 532 ("after her") of what layer 3 of the model that ships
reads, leaves out what its square adds to the layer's output at the tokens where it is strongest, and
stores the chance of "she" before and after in `brake.json` beside this file, with random changes of the
same lengths. ``--page`` puts two sentences into demos/docs/explorer.md. It was found with the explorer.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.__main__ import environment
from tests.benchmarks.costs_page import between_marks
from tl_bilinear import FeatureInteractions, load_demo_model, load_demo_saes
from tl_bilinear.demo import load_demo_tokens
from tl_bilinear.features.labels import pieces

RESULTS = Path(__file__).with_name("brake.json")
PAGE = Path(__file__).parents[2] / "demos" / "docs" / "explorer.md"
LAYER, FEATURE, WORD = 3, 532, "she"
TOKENS, CONTROLS, SEED = 150, 20, 0


@torch.no_grad()
def measure() -> dict[str, Any]:
    model = load_demo_model("cpu")
    saes = load_demo_saes(LAYER)
    features = FeatureInteractions(model, LAYER, saes["mlp_in"], saes["mlp_out"])
    run = features.run(load_demo_tokens())
    z = run.activations([FEATURE], side="input")[..., 0].masked_fill(~run.mask, 0)
    active = (z > 0).flatten().nonzero()[:, 0]
    drawn = active[torch.randperm(len(active), generator=torch.Generator().manual_seed(SEED))]
    chosen = {"strongest": z.flatten().topk(TOKENS).indices, "drawn": drawn[:TOKENS]}
    token = model.to_single_token(WORD)
    hook = f"blocks.{LAYER}.hook_resid_post"

    def chance(residual: torch.Tensor) -> torch.Tensor:
        return model.unembed(model.ln_final(residual)).softmax(-1)[..., token]

    found: dict[str, Any] = {}
    for name, places in chosen.items():
        rows, positions = places // z.shape[1], places % z.shape[1]
        written = z[rows, positions][:, None] * features.input_directions[FEATURE]
        # The layer's quadratic part, of what the feature writes alone: the pair of it with itself.
        square = features.hook_tensor.parts().interaction(written / run.scale[rows, positions])
        used = rows.unique()
        _, cache = model.run_with_cache(run.tokens[used], names_filter=hook, return_type=None)
        residual = cache[hook][torch.searchsorted(used, rows), positions]
        random = torch.randn(CONTROLS, *square.shape, generator=torch.Generator().manual_seed(SEED))
        random *= square.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
        before, after = chance(residual), chance(residual - square)
        by_chance = chance(residual - random) - before
        found[name] = {
            "tokens": len(places),
            "before": float(before.mean()),
            "after": float(after.mean()),
            "rises": int((after > before).sum()),
            "random": float(by_chance.abs().mean()),
            "random_rises": float((by_chance > 0).float().mean()),
        }
        if name == "strongest":
            at = {"row": int(rows[0]), "position": int(positions[0])}
            at |= {"before": float(before[0]), "after": float(after[0])}
            at["random"] = float(by_chance[:, 0].abs().mean())
            there = run.tokens[rows[0], max(0, positions[0] - 11) : positions[0] + 1]
            at["text"] = "".join(pieces(model.tokenizer, there.tolist())).strip()
            found["first"] = at
    settings = {"layer": LAYER, "feature": FEATURE, "token": WORD, "controls": CONTROLS}
    counts = {"active_on": len(active), "of": int(run.mask.sum())}
    return settings | counts | found | {"environment": environment()}


def shown(found: dict[str, Any]) -> str:
    """What the page says of it."""
    at, strongest, drawn = (found[name] for name in ("first", "strongest", "drawn"))

    def rise(part: dict[str, Any]) -> str:
        return f"from {part['before']:.3f} to {part['after']:.3f}"

    up = strongest["rises"] + drawn["rises"]
    text = (
        f"Found with this page: input feature {found['feature']} of layer {found['layer']} (“after "
        f"her”) holds back its own token. Without its pair with itself, the chance of "
        f"“{found['token']}” goes from {at['before']:.0%} to {at['after']:.0%} at its strongest place; "
        f"at its {strongest['tokens']} strongest tokens {rise(strongest)} (random changes of the same "
        f"length: {strongest['random']:.3f} up or down), at {drawn['tokens']} drawn from all where it "
        f"is active {rise(drawn)} ({drawn['random']:.3f}), and up at {up} of the "
        f"{strongest['tokens'] + drawn['tokens']} (`tests/truth/brake.py`)."
    )
    return textwrap.fill(text, 119)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    block = shown(json.loads(RESULTS.read_text()))
    PAGE.write_text(between_marks(PAGE.read_text(), "brake", block))


if __name__ == "__main__":
    main()
