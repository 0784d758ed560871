"""Approximations of gated models of several families, as every part of the package takes them."""

import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from tests.models.building import write_tokenizer
from tests.models.test_approximation import make
from tl_bilinear.circuits import (
    FeatureCircuit,
    composed,
    embedding,
    paths,
    source_pairs,
    virtual_weights,
)
from tl_bilinear.features import Dictionary, FeatureInteractions
from tl_bilinear.hooks import EigenComponents, ReplaceLayer, loss_added, verify
from tl_bilinear.models.approximation import Replacement, approximate_llama

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama with biases": (LlamaConfig, {"mlp_bias": True, "attention_bias": True}),
    "mistral": (MistralConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "gemma": (GemmaConfig, {"head_dim": 4}),
    "gemma2": (Gemma2Config, {"head_dim": 4}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
}
LAYER = 1


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 50, (40, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, rows, tmp_path_factory):
    """A model of Hugging Face, its bridges (raw, processed), and the approximations of each."""
    from transformer_lens.model_bridge import TransformerBridge

    config, options = FAMILIES[request.param]
    llama = make(config, **options)
    folder = tmp_path_factory.mktemp("model")
    llama.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder))
    models = {"llama": llama}
    for name in ("raw", "processed"):
        # Processed weights are written into the model that a bridge wraps, so each has its own.
        models[name] = TransformerBridge.boot_transformers(
            str(folder),
            hf_model=AutoModelForCausalLM.from_pretrained(folder),
            tokenizer=tokenizer,
            device="cpu",
        )
    models["processed"].enable_compatibility_mode(disable_warnings=True)
    found = {
        name: approximate_llama(model, rows, [0, LAYER], warn_below=-1e9, progress=False)
        for name, model in models.items()
    }
    return request.param, models, found


def test_a_bridge_takes_the_approximation_of_the_model_that_it_wraps(family, rows):
    _, models, found = family
    one = found["llama"][LAYER]
    with Replacement({LAYER: one}).applied(models["llama"]), torch.no_grad():
        want = models["llama"](rows[:3]).logits.log_softmax(-1)
    with ReplaceLayer(one, layer=LAYER).applied(models["raw"]), torch.no_grad():
        given = models["raw"](rows[:3]).log_softmax(-1)
    assert_close(given, want, rtol=1e-4, atol=1e-4)


def test_the_basis_of_a_processed_model_is_another(family, rows):
    """Refused by the same check everywhere, Gemma's norm, whose weight is stored less 1, included."""
    _, models, found = family
    raw, own, model = found["raw"][LAYER], found["processed"][LAYER], models["processed"]
    saes = torch.randn(5, 16)
    direction = torch.ones(16)
    calls = [
        lambda it: ReplaceLayer(it, layer=LAYER).fwd_hooks(model),
        lambda it: FeatureInteractions(model, LAYER, saes, saes, layer_tensor=it),
        lambda it: (
            EigenComponents(it.tensor.interaction(direction).eigh(2), layer=LAYER)
            .low_rank(1)
            .fwd_hooks(model)
        ),
        lambda it: virtual_weights(model, embedding(model), LAYER, direction, k=2, layer_tensor=it),
        lambda it: FeatureCircuit(
            model, {LAYER: saes}, {"embed": embedding(model)}, layer_tensors={LAYER: it}
        ),
        lambda it: composed(
            model, 0, LAYER, direction, layer_tensors={0: found["processed"][0], LAYER: it}
        ),
    ]
    for call in calls:
        call(own)
        with pytest.raises(ValueError, match=r"after RMSNorm and its weight.*without a weight"):
            call(raw)
    tokens = rows[:3]
    with ReplaceLayer(own, layer=LAYER).applied(model), torch.no_grad():
        given = model(tokens).log_softmax(-1)
    with ReplaceLayer(raw, layer=LAYER).applied(models["raw"]), torch.no_grad():
        want = models["raw"](tokens).log_softmax(-1)
    # The same function, fitted in other coordinates: up to the ridge.
    assert_close(given, want, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_everything_takes_it_as_it_comes_and_says_what_it_is(family, rows, kind):
    name, models, found = family
    model, one = models[kind], found[kind][LAYER]
    note = f"approximation of a {one.activation} layer, {one.variance_explained:.1%}"
    saes, direction = torch.randn(5, 16), torch.randn(16)

    edit = ReplaceLayer(one, layer=LAYER)
    assert note in repr(edit)
    features = FeatureInteractions(model, LAYER, saes, saes, layer_tensor=one)
    assert note in repr(features)
    assert note in repr(features.run(rows[:2], progress=False))
    components = EigenComponents(one.tensor.interaction(direction).eigh(3), layer=LAYER)
    checked = verify(model, rows[:2], components, at="output", controls=0, progress=False)
    assert float(checked.error.max()) < 1e-3
    edits = {"replaced": edit, "rank 2": components.low_rank(2)}
    assert torch.isfinite(loss_added(model, rows[:2], edits, progress=False).difference).all()

    upstream = embedding(model)
    weights = virtual_weights(model, upstream, LAYER, direction, k=2, layer_tensor=one)
    assert note in repr(weights)
    pairs = source_pairs(model, LAYER, direction, upstream, upstream, k=3, layer_tensor=one)
    assert note in repr(pairs)
    assert note in repr(pairs.top(2))
    circuit = FeatureCircuit(model, {LAYER: saes}, {"embed": upstream}, layer_tensors={LAYER: one})
    graph = circuit.graph(3)
    assert f"layer {LAYER}: {note}" in repr(circuit)
    assert f"layer {LAYER}: {note}" in repr(graph)
    assert note in graph.networkx().graph["approximation"]

    if name == "gemma2":
        with pytest.raises(ValueError, match="without a norm after them"):
            paths(model, rows[0], LAYER, direction, layer_tensor=one)
        return
    split = paths(model, rows[0], LAYER, direction, position=5, layer_tensor=one)
    assert note in repr(split)
    assert note in split.text()
    _, cache = model.run_with_cache(rows[:1])
    hook = f"blocks.{LAYER}.mlp.hook_in"
    want = one.tensor(cache[hook][0, 5]) @ direction
    assert split.total == pytest.approx(want.item(), rel=1e-3, abs=1e-4)
    assert split.measured == pytest.approx(
        (cache[f"blocks.{LAYER}.mlp.hook_out"][0, 5] @ direction).item(), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_the_passage_from_the_residual_stream_holds(family, rows, kind):
    """mlp.hook_in is the residual stream through the norm, also where Gemma stores its weight less 1."""
    _, models, found = family
    model = models[kind]
    saes = torch.randn(5, 16)
    at = Dictionary(saes, hook=f"blocks.{LAYER}.hook_resid_mid")
    features = FeatureInteractions(model, LAYER, at, saes, layer_tensor=found[kind][LAYER])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens's, on what its hooks compute
        _, cache = model.run_with_cache(rows[:2])
    passage = features.passage
    x = passage.map(cache[passage.hook]) / cache[passage.scale_hook]
    assert_close(x, cache[passage.layer_hook], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_stand_for_a_layer_is_refused(family):
    _, models, _ = family
    with pytest.raises(
        TypeError, match="layer_tensor must be a BilinearTensor or an Approximation"
    ):
        FeatureInteractions(models["raw"], LAYER, torch.eye(16), torch.eye(16), layer_tensor=3)


def test_a_gated_layer_is_refused_with_the_way_to_read_it(family):
    _, models, _ = family
    with pytest.raises(ValueError, match=r"approximate_llama\(model, tokens\)"):
        FeatureInteractions(models["raw"], LAYER, torch.eye(16), torch.eye(16))
