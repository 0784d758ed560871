"""The model and SAEs that ship: what the card says of them is so, and the package works on them."""

import inspect

import pytest
import torch

import tl_bilinear
from tl_bilinear import FeatureInteractions, demo
from tl_bilinear.features import evaluate_saes
from tl_bilinear.models import HookedBilinearTransformer
from tl_bilinear.recipes.language import (
    LanguageConfig,
    SAETrainingConfig,
    train_language_model,
    train_saes,
)

LAYER = demo.demo_layers()[-1]


@pytest.fixture(scope="module")
def model():
    return tl_bilinear.load_demo_model("cpu")


@pytest.fixture(scope="module")
def saes():
    return tl_bilinear.load_demo_saes(LAYER)


@pytest.fixture(scope="module")
def tokens():
    return demo.load_demo_tokens()


def test_it_is_small_and_needs_no_network():
    files = [path for path in demo.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert not any(path.is_symlink() for path in files)


def test_the_model_writes_as_well_as_the_card_says(model, tokens):
    """Its own stories are easier than those of others, but not by much."""
    assert isinstance(model, HookedBilinearTransformer)
    assert model.cfg.dtype == torch.float32
    card = demo.demo_card()["model"]
    weights = [p for name, p in model.named_parameters() if "W_" in name]
    assert sum(p.numel() for p in weights) == card["parameters"]
    with torch.no_grad():
        logits = model(tokens[:8])
    bos = model.tokenizer.bos_token_id
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:8, 1:, None])[..., 0]
    loss = float(losses[tokens[:8, 1:] != bos].mean())
    assert 0.6 * card["loss"] < loss < 1.1 * card["loss"]
    assert abs(card["loss"] - card["loss_before_rounding"]) < 2e-3
    text = model.generate("once upon a time", max_new_tokens=20, verbose=False)
    assert len(text.split()) > 8


def test_its_stories_are_text_of_its_vocabulary(model, tokens):
    stories = demo.load_demo_stories()
    assert len(stories) == demo.demo_card()["stories"]
    assert len(set(stories)) > 0.95 * len(stories)
    assert tokens.shape[1] == model.cfg.n_ctx
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert not (tokens == model.tokenizer.unk_token_id).any()
    first = tokens[0, 1 : tokens[0].tolist().index(model.tokenizer.eos_token_id)]
    assert model.tokenizer.decode(first) == stories[0]


def test_the_saes_are_what_the_card_says(model, saes, tokens):
    assert sorted(saes) == ["mlp_in", "mlp_out", "resid_mid"]
    named = {f"{LAYER}-{point}": sae for point, sae in saes.items()}
    found = evaluate_saes(model, named, tokens[:16], progress=False)
    card = {each["sae"]: each for each in demo.demo_card()["saes"]["evaluation"]}
    for name, l0, nmse, recovered in zip(
        found.names, found.l0, found.nmse, found.recovered, strict=True
    ):
        # On the model's own stories, so about as on validation text.
        assert float(l0) == pytest.approx(card[name]["l0"], rel=0.05)
        assert float(nmse) == pytest.approx(card[name]["nmse"], abs=0.15)
        assert float(recovered) == pytest.approx(card[name]["loss_recovered"], abs=0.15)


def test_saes_attach_as_saelens_attaches_them(model, saes, tokens):
    sae = saes["resid_mid"]
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens[:2], saes=[sae])
    active = cache[f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"]
    assert active.shape == (2, 256, sae.cfg.d_sae)


def test_features_of_the_demo(model, saes, tokens):
    features = FeatureInteractions(model, LAYER, saes["resid_mid"], saes["mlp_out"])
    run = features.run(tokens[:32], progress=False)
    found = run.low_rank_correlation(k=2, progress=False)
    feature = int(found.features[found.counts.argmax()])
    examples = run.examples(feature, k=1)
    attribution = run.attribute(feature, int(examples.positions[0]), int(examples.sequences[0]))
    assert attribution.error < 1e-5
    assert attribution.measured == pytest.approx(float(examples.values[0]), rel=1e-3)


def test_the_moments_that_ship_are_those_of_the_stories(model, tokens):
    mask = ~torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    mask[:, 0] = False
    name = f"blocks.{LAYER}.mlp.hook_in"
    read = []
    with torch.no_grad():
        for rows in tokens.split(32):
            _, cache = model.run_with_cache(rows, names_filter=name, stop_at_layer=LAYER + 1)
            read.append(cache[name])
    x = torch.cat(read)[mask].double()
    found = demo.load_demo_moments(LAYER)
    assert found.count == len(x) > 50_000
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.second, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert demo.load_demo_moments(0).space.startswith("blocks.0.mlp.hook_in")
    with pytest.raises(ValueError, match=r"layers are \[0, 1, 2, 3\]"):
        demo.load_demo_moments(7)


def test_a_layer_without_saes():
    with pytest.raises(ValueError, match=r"layer 9 of the demo model has no SAEs; \d.* do"):
        tl_bilinear.load_demo_saes(9)


def test_the_model_card_has_its_numbers():
    card, text = demo.demo_card(), (demo.FOLDER / "MODEL_CARD.md").read_text()
    for name in ("loss", "loss_before_rounding", "training_loss"):
        assert f"{card['model'][name]:.3f}" in text
    for row in card["saes"]["evaluation"]:
        assert f"| {row['sae']} | {row['nmse']:.3f} |" in text


def test_packing_what_was_trained(story_data, tmp_path, monkeypatch):
    """From two small runs to files that the loaders read."""
    lm = LanguageConfig(
        n_layers=2, d_model=16, d_mlp=24, n_heads=2, batch=16, steps=150, learning_rate=2e-2
    )
    options = {"device": "cpu", "progress": False, "precision": "fp32"}
    run = train_language_model(story_data, lm, folder=tmp_path / "lm", **options)
    config = SAETrainingConfig(layers=(0,), k=4, tokens=2000, batch=200, learning_rate=1e-3)
    saes = train_saes(
        run.model_folder, story_data, config, folder=tmp_path / "saes", progress=False
    )
    out = tmp_path / "files"
    from tl_bilinear.demo.pack import app

    arguments = [run.folder, saes.folder, story_data.folder, out, "--stories", 8]
    app([str(each) for each in arguments])
    demo.demo_card.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(demo, "FOLDER", out)
        model, read = demo.load_demo_model("cpu"), demo.load_demo_saes(0)
        assert sorted(read) == ["mlp_in", "mlp_out", "resid_mid"]
        assert demo.demo_layers() == (0,)
        assert len(demo.load_demo_stories()) == 8
        tokens = inspect.unwrap(demo.load_demo_tokens)()  # annotated as those of the one that ships
        assert tokens.shape[1] == 32
        assert model.cfg.dtype == read["mlp_in"].W_dec.dtype == torch.float32
    demo.demo_card.cache_clear()
    assert "--n-layers 2 --d-model 16" in (out / "MODEL_CARD.md").read_text()
    # A second packing replaces the first, and nothing else.
    app([str(each) for each in arguments])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text.txt").write_text("mine")
    arguments[3] = tmp_path / "mine"
    with pytest.raises(FileExistsError):
        app([str(each) for each in arguments])
