"""HookedTransformer.from_config."""

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import MLP, GatedMLP

from tests.models.building import TOKENS, config
from tl_bilinear import BilinearMLP, BilinearTransformerConfig, HookedBilinearTransformer
from tl_bilinear.models import bilinear_class, register

ORDINARY = config(act_fn="relu")


def test_keyword_arguments_a_dict_and_config_objects_give_the_same_model():
    given = [
        ((), {"bilinear": True, **config()}),
        ((config(),), {"bilinear": True}),
        (({"bilinear": True, **config()},), {}),
        ((HookedTransformerConfig(**config()),), {"bilinear": True}),
        ((BilinearTransformerConfig(**config()),), {}),
        ((BilinearTransformerConfig(**config()).to_dict(),), {}),
    ]
    models = [HookedTransformer.from_config(*args, **kwargs) for args, kwargs in given]
    models.append(HookedBilinearTransformer.from_config(**config()))
    for model in models:
        assert type(model) is HookedBilinearTransformer
        assert type(model.blocks[0].mlp) is BilinearMLP
        assert not model.cfg.bilinear_bias
        assert torch.equal(model(TOKENS), models[0](TOKENS))


def test_ordinary_model_by_default():
    for cfg in (ORDINARY, HookedTransformerConfig(**ORDINARY)):
        for bilinear in ({}, {"bilinear": False}):
            model = HookedTransformer.from_config(cfg, **bilinear)
            assert type(model) is HookedTransformer
            assert type(model.cfg) is HookedTransformerConfig
            assert type(model.blocks[0].mlp) is MLP
    direct = HookedTransformer(HookedTransformerConfig(**ORDINARY))
    assert torch.equal(model(TOKENS), direct(TOKENS))
    gated = HookedTransformer.from_config(config(gated_mlp=True, act_fn="silu"))
    assert type(gated.blocks[0].mlp) is GatedMLP


def test_biases():
    model = HookedTransformer.from_config(bilinear=True, bilinear_bias=True, **config())
    names = dict(model.named_parameters())
    assert all(f"blocks.1.mlp.{name}" in names for name in ("b_gate", "b_in", "b_out"))


def test_keyword_arguments_go_over_the_config_and_leave_it_alone():
    for cfg in (
        config(),
        HookedTransformerConfig(**config()),
        BilinearTransformerConfig(**config()),
    ):
        before = dict(cfg) if isinstance(cfg, dict) else dict(cfg.to_dict())
        model = HookedTransformer.from_config(cfg, bilinear=True, n_layers=1, d_mlp=7)
        assert (model.cfg.n_layers, model.cfg.d_mlp, model.cfg.d_model) == (1, 7, 16)
        model.to(torch.bfloat16, print_details=False)
        assert (dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()) == before
    cfg = HookedTransformerConfig(**ORDINARY)
    model = HookedTransformer.from_config(cfg)
    model.to(torch.bfloat16, print_details=False)
    assert cfg.dtype == torch.float32


@pytest.mark.parametrize("bilinear", [False, True])
def test_what_a_config_derived_follows_the_keyword_arguments(bilinear):
    fields = {k: v for k, v in ORDINARY.items() if k != "d_mlp"}
    cfg = HookedTransformerConfig(**fields)
    changed = {"d_model": 32, "d_head": 4, "d_vocab": 30}
    model = HookedTransformer.from_config(cfg, bilinear=bilinear, **changed)
    fresh = HookedTransformer.from_config(**{**fields, **changed} | {"act_fn": "identity"})
    for name in ("n_heads", "d_mlp", "d_vocab_out", "attn_scale", "initializer_range"):
        assert getattr(model.cfg, name) == getattr(fresh.cfg, name), name
    kept = HookedTransformer.from_config(
        HookedTransformerConfig(**{**fields, "d_mlp": 20, "attn_scale": 7.0}),
        bilinear=bilinear,
        **changed,
    )
    assert kept.cfg.d_mlp == 20
    assert kept.cfg.attn_scale == 7.0


def test_move_to_device_and_tokenizer_are_passed_on():
    with pytest.raises(AssertionError, match="not a supported tokenizer"):
        HookedTransformer.from_config(bilinear=True, tokenizer="gpt2", **config())
    model = HookedTransformer.from_config(bilinear=True, move_to_device=False, **config())
    assert model.W_in.device.type == "cpu"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("bilinear", [False, True])
def test_unknown_field_names_the_nearest(bilinear):
    with pytest.raises(TypeError, match=r"'n_layer' \(did you mean 'n_layers'\?\)"):
        HookedTransformer.from_config(bilinear=bilinear, n_layer=2, **ORDINARY)
    with pytest.raises(TypeError, match=r"'normalisation' \(did you mean 'normalization_type'\?\)"):
        HookedTransformer.from_config({"normalisation": "RMS"}, bilinear=bilinear)


def test_unknown_field_in_the_constructor_too():
    with pytest.raises(TypeError, match=r"'bilinear_biases'.*'bilinear_bias'"):
        HookedBilinearTransformer(config(bilinear_biases=True))


def test_missing_fields_are_named():
    with pytest.raises(TypeError, match="needs d_head, n_ctx"):
        HookedTransformer.from_config(bilinear=True, n_layers=1, d_model=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'.*no element-wise nonlinearity"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"gated_mlp": False}, "gated_mlp=False"),
        ({"num_experts": 4, "experts_per_token": 2}, "num_experts=4"),
        ({"load_in_4bit": True}, "load_in_4bit"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(ValueError, match=f"bilinear=True contradicts {message}"):
        HookedTransformer.from_config(bilinear=True, **config(), **fields)
    with pytest.raises(ValueError, match=message):
        HookedTransformer.from_config({**config(), **fields}, bilinear=True)


def test_contradictions_in_a_config_object():
    cfg = HookedTransformerConfig(**config(act_fn="gelu"))
    with pytest.raises(ValueError, match="act_fn='gelu'"):
        HookedTransformer.from_config(cfg, bilinear=True)
    model = HookedTransformer.from_config(cfg, bilinear=True, act_fn="identity")
    assert type(model) is HookedBilinearTransformer
    with pytest.raises(ValueError, match="bilinear=False contradicts"):
        HookedTransformer.from_config(BilinearTransformerConfig(**config()), bilinear=False)
    with pytest.raises(ValueError, match="bilinear=False contradicts"):
        HookedBilinearTransformer.from_config(**config(), bilinear=False)
    with pytest.raises(ValueError, match="pass bilinear=True"):
        HookedTransformer.from_config(bilinear_bias=True, **ORDINARY)


def test_other_config_types_are_named(unchecked):
    with pytest.raises(TypeError, match=r"not builtins\.str"):
        HookedTransformer.from_config("gpt2", bilinear=True)


@pytest.mark.parametrize("name", ["linear", "identity", None])
def test_names_of_the_identity_are_no_contradiction(name):
    model = HookedTransformer.from_config(bilinear=True, act_fn=name, **config())
    assert model.cfg.act_fn == "identity"


def test_registering_again_changes_nothing():
    before = HookedTransformer.__dict__["from_config"]
    register()
    assert HookedTransformer.__dict__["from_config"] is before


def test_bilinear_class():
    class Mine(HookedTransformer):
        pass

    assert bilinear_class(HookedTransformer) is HookedBilinearTransformer
    assert bilinear_class(HookedBilinearTransformer) is HookedBilinearTransformer
    assert bilinear_class(Mine) is bilinear_class(Mine)
    assert issubclass(bilinear_class(Mine), Mine)
    model = Mine.from_config(bilinear=True, **config())
    assert isinstance(model, Mine)
    assert isinstance(model, HookedBilinearTransformer)
    assert type(Mine.from_config(**ORDINARY)) is Mine
    with pytest.raises(TypeError, match="not a subclass of HookedTransformer"):
        bilinear_class(torch.nn.Linear)


def test_help_describes_it():
    assert "bilinear_bias" in HookedTransformer.from_config.__doc__
    assert HookedTransformer.from_config.__name__ == "from_config"
