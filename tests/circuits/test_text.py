"""Paths of a model trained on real text, in float32, with a real tokenizer."""

import math

import pytest
import torch
from transformer_lens import HookedTransformer

from tl_bilinear import FeatureInteractions
from tl_bilinear.circuits import check_paths, direct_path, embedding, paths, unembedding

pytestmark = pytest.mark.shared

TEXT = "Once upon a time there was a little girl. She was very"
CONTEXT = 48


@pytest.fixture(scope="module")
def trained():
    from transformers import AutoTokenizer

    from tests.conftest import SHARED

    data = SHARED / "data"
    if not (data / "stories260K").is_dir():
        pytest.skip(f"needs real data that this machine does not have: {data / 'stories260K'}")
    tokenizer = AutoTokenizer.from_pretrained(data / "stories260K")
    text = (data / "tinystories_valid.txt").read_text()[:150_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    torch.manual_seed(0)
    model = HookedTransformer.from_config(
        bilinear=True, bilinear_bias=True, tokenizer=tokenizer, n_layers=2, d_model=48, d_head=12,
        d_mlp=96, n_ctx=CONTEXT, d_vocab=512, normalization_type="LN", device="cpu", seed=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 150)
        loss = model(rows[torch.randint(len(rows), (24,))], return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.75 * math.log(512)
    return model


@pytest.mark.parametrize("folded", [False, True])
def test_exact_on_text(trained, folded):
    import copy

    model = copy.deepcopy(trained)
    if folded:
        model.process_weights_()
    rows = unembedding(model).decoder
    token = int(model(TEXT)[0, -1].argmax())
    for layer in (0, 1):
        for by in ("sources", "heads"):
            found = paths(model, TEXT, layer, rows[token], by=by)
            assert found.error < 1e-5
            _, cache = model.run_with_cache(TEXT)
            made = float(
                cache[f"blocks.{layer}.mlp.hook_out"][0, -1].double() @ rows[token].double()
            )
            assert found.total == pytest.approx(made, rel=1e-5, abs=1e-5)
            assert check_paths(model, TEXT, found, 6).difference < 1e-4
    last = model.to_tokens(TEXT)[0, -1]
    labels = paths(model, TEXT, 0, rows[token]).labels
    assert any(label.endswith(repr(model.tokenizer.decode([int(last)]))) for label in labels)


def test_token_pairs_have_names(trained):
    features = FeatureInteractions(
        trained, 0, direct_path(trained, 0, embedding(trained)), unembedding(trained)
    )
    tokenizer = trained.tokenizer
    token = int(trained.to_tokens(TEXT)[0, -1])
    assert features.outputs.label(token) == f"{token} {tokenizer.convert_ids_to_tokens(token)}"
    table = features.top(token, 5).to_pandas()
    names = tokenizer.convert_ids_to_tokens(table["first"].tolist())
    assert table["label_first"].tolist() == names
