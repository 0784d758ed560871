"""BilinearTensor.from_model and from_mlp."""

import pytest
import torch
from sae_lens import HookedSAETransformer
from torch import nn
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import MLP, GatedMLP
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.building import TOKENS, bilinear_model, config, randomise, reference_mlp
from tl_bilinear import BilinearMLP, BilinearTensor


def tl_model(**fields):
    return randomise(HookedTransformer(HookedTransformerConfig(**config(**fields))))


def gated(**fields):
    return tl_model(gated_mlp=True, act_fn="identity", **fields)


def assert_is_the_layer(tensor, model, layer):
    """The tensor maps what goes into the MLP to what comes out of it, in a run of the model."""
    inputs, outputs = [], []
    mlp = model.blocks[layer].mlp

    def record(module, args, output):
        inputs.append(args[0])
        outputs.append(output)

    handle = mlp.register_forward_hook(record)
    model(TOKENS)
    handle.remove()
    assert_close(tensor(inputs[0]), outputs[0].float(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- TransformerLens models


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["RMS", "LN", "RMSPre", "LNPre", None])
def test_bilinear_models(bias, norm):
    model = bilinear_model(bilinear_bias=bias, normalization_type=norm)
    for layer in (0, 1):
        tensor = BilinearTensor.from_model(model, layer)
        assert tensor.shape == (16, 16, 16)
        assert tensor.has_biases == bias
        x = torch.randn(3, 16)
        expected = reference_mlp(model.blocks[layer].mlp, x).float()
        assert_close(tensor(x), expected, rtol=1e-4, atol=1e-5)
        assert_is_the_layer(tensor, model, layer)


def test_layout():
    model = bilinear_model(bilinear_bias=True)
    tensor = BilinearTensor.from_model(model, 1)
    mlp = model.blocks[1].mlp
    assert torch.equal(tensor.left, mlp.W_gate.T)
    assert torch.equal(tensor.right, mlp.W_in.T)
    assert torch.equal(tensor.out, mlp.W_out.T)
    assert torch.equal(tensor.bias_left, mlp.b_gate)
    assert torch.equal(tensor.bias_right, mlp.b_in)
    assert torch.equal(tensor.bias_out, mlp.b_out)


def test_sae_lens_model_with_and_without_saes_attached():
    model = HookedSAETransformer.from_config(config(), bilinear=True)
    tensor = BilinearTensor.from_model(model, 0)
    assert_is_the_layer(tensor, model, 0)
    plain = HookedTransformer.from_config(config(), bilinear=True)
    assert torch.equal(tensor.left, BilinearTensor.from_model(plain, 0).left)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_folding_moves_the_norm_into_the_tensor(norm):
    model = bilinear_model(normalization_type=norm, bilinear_bias=True)
    before = BilinearTensor.from_model(model, 1)
    ln = {name: p.detach().clone() for name, p in model.blocks[1].ln2.named_parameters()}
    model.process_weights_(center_writing_weights=False)
    after = BilinearTensor.from_model(model, 1)
    x = torch.randn(5, 16)
    if norm == "LN":
        x = x - x.mean(-1, keepdim=True)
    expected = before(x * ln["w"] + ln.get("b", 0))
    assert_close(after(x), expected, rtol=1e-4, atol=1e-5)
    assert "weight" in before.input_space
    assert "without" not in before.input_space
    assert "without" in after.input_space


@pytest.mark.parametrize(
    ("fields", "space"),
    [
        ({"normalization_type": "RMS"}, "after RMSNorm and its weight"),
        ({"normalization_type": "RMSPre"}, "after RMSNorm without a weight"),
        ({"normalization_type": "LN"}, "after LayerNorm, its weight and its bias"),
        ({"normalization_type": "LNPre"}, "after LayerNorm without weight and bias"),
        ({"normalization_type": None}, "no normalisation"),
    ],
)
def test_spaces(fields, space):
    tensor = BilinearTensor.from_model(bilinear_model(**fields), 1)
    assert tensor.input_space == f"blocks.1.mlp.hook_in (input of the MLP, {space})"
    assert tensor.output_space == "blocks.1.hook_mlp_out"


def test_spaces_of_unusual_blocks():
    sandwich = bilinear_model(use_normalization_before_and_after=True)
    tensor = BilinearTensor.from_model(sandwich, 0)
    assert tensor.output_space == "blocks.0.mlp.hook_out (before the norm that follows the MLP)"
    _, cache = sandwich.run_with_cache(TOKENS)
    output = tensor(cache["blocks.0.mlp.hook_in"])
    assert_close(output, cache["blocks.0.mlp.hook_out"], rtol=1e-4, atol=1e-5)
    tensor = BilinearTensor.from_model(gated(), 0)
    assert tensor.input_space.startswith("input of blocks.0.mlp (input of the MLP, after RMSNorm")
    post_norm = bilinear_model(original_architecture="Olmo2ForCausalLM")
    tensor = BilinearTensor.from_model(post_norm, 0)
    assert "no normalisation" in tensor.input_space
    assert_is_the_layer(tensor, post_norm, 0)


def test_a_tensor_is_a_snapshot():
    model = bilinear_model(bilinear_bias=True, d_model=8, d_mlp=1)
    tensor = BilinearTensor.from_model(model, 0)
    kept = [f.clone() for f in (tensor.left, tensor.right, tensor.out, tensor.bias_left)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for one, other in zip(
        kept, (tensor.left, tensor.right, tensor.out, tensor.bias_left), strict=True
    ):
        assert torch.equal(one, other)
        assert not other.requires_grad


def test_bfloat16_becomes_float32():
    model = bilinear_model().to(torch.bfloat16, print_details=False)
    tensor = BilinearTensor.from_model(model, 0)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor.left, model.W_gate[0].T.float())


def test_layers_count_from_either_end():
    model = bilinear_model()
    last = BilinearTensor.from_model(model, 1)
    assert torch.equal(BilinearTensor.from_model(model, -1).left, last.left)
    assert BilinearTensor.from_model(model, -1).input_space == last.input_space
    assert BilinearTensor.from_model(bilinear_model(n_layers=1)).input_space.startswith("blocks.0.")


def test_gated_mlp_with_identity_activation():
    """Its b_in comes after the product, so it is a constant at the output."""
    model = gated()
    assert type(model.blocks[0].mlp) is GatedMLP
    assert model.blocks[0].mlp.b_in.any()
    for layer in (0, 1):
        tensor = BilinearTensor.from_model(model, layer)
        assert tensor.bias_left is tensor.bias_right is None
        assert_is_the_layer(tensor, model, layer)
        assert torch.equal(BilinearTensor.from_mlp(model.blocks[layer].mlp).left, tensor.left)
    with torch.no_grad():
        model.blocks[0].mlp.b_in.zero_()
        model.blocks[0].mlp.b_out.zero_()
    assert not BilinearTensor.from_model(model, 0).has_biases


def test_an_activation_is_judged_by_what_it_does():
    model = tl_model(gated_mlp=True, act_fn="silu")
    for block in model.blocks:
        block.mlp.act_fn = nn.Identity()
    assert_is_the_layer(BilinearTensor.from_model(model, 0), model, 0)
    for block in model.blocks:
        block.mlp.act_fn = nn.Hardtanh(-50, 50)
    with pytest.raises(ValueError, match="not bilinear"):
        BilinearTensor.from_model(model, 0)


def test_a_module_that_the_user_put_in_a_block():
    model = tl_model(act_fn="gelu")
    model.blocks[1].mlp = LeftRightOut(width=16)
    tensor = BilinearTensor.from_model(model, 1)
    assert_is_the_layer(tensor, model, 1)
    assert (
        tensor.input_space
        == "input of blocks.1.mlp (input of the MLP, after RMSNorm and its weight)"
    )
    model.blocks[1].mlp = nn.Linear(16, 16)
    with pytest.raises(TypeError, match="no reader recognises this MLP"):
        BilinearTensor.from_model(model, 1)


# ---------------------------------------------------------------------- TransformerLens errors


def test_a_subclass_with_its_own_forward_is_not_misread():
    class Swish(BilinearMLP):
        def forward(self, x):
            return x

    class Renamed(BilinearMLP):
        pass

    with pytest.raises(ValueError, match="is a Swish, a subclass of BilinearMLP with a forward of"):
        BilinearTensor.from_mlp(randomise(Swish(config())))
    mlp = Renamed(config())
    mlp.load_state_dict(bilinear_model().blocks[0].mlp.state_dict())
    assert BilinearTensor.from_mlp(mlp).shape == (16, 16, 16)


@pytest.mark.parametrize("layer", [2, -3, 100])
def test_layer_out_of_range(layer):
    with pytest.raises(IndexError, match=rf"layer {layer} does not exist.*0 to 1, or -2 to -1"):
        BilinearTensor.from_model(bilinear_model(), layer)


def test_layer_not_said_or_not_a_number():
    with pytest.raises(ValueError, match="has 2 layers: say which one"):
        BilinearTensor.from_model(bilinear_model())
    with pytest.raises(TypeError):
        BilinearTensor.from_model(bilinear_model(), 0.5)


def test_layer_without_an_mlp():
    with pytest.raises(ValueError, match=r"blocks\.1 has no MLP.*attn_only=True"):
        BilinearTensor.from_model(bilinear_model(attn_only=True), 1)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"act_fn": "gelu"}, "MLP with act_fn='gelu'"),
        ({"act_fn": "solu_ln"}, "MLP with act_fn='solu_ln'"),
        ({"act_fn": "silu", "gated_mlp": True}, "GatedMLP with act_fn='silu'"),
        ({"act_fn": "identity"}, "MLP with act_fn='identity'"),
    ],
)
def test_layer_that_is_not_bilinear(fields, found):
    model = tl_model(**fields)
    with pytest.raises(ValueError, match=rf"blocks\.1\.mlp is not bilinear: it is a {found}"):
        BilinearTensor.from_model(model, 1)
    with pytest.raises(ValueError, match=f"is not bilinear: it is a {found}"):
        BilinearTensor.from_mlp(model.blocks[0].mlp)


def test_mixture_of_experts():
    model = tl_model(act_fn="silu", gated_mlp=True, num_experts=3, experts_per_token=1)
    with pytest.raises(ValueError, match=r"mixture of experts \(MoE, 3 experts, act_fn='silu'\)"):
        BilinearTensor.from_model(model, 0)


def test_models_nobody_reads():
    with pytest.raises(TypeError, match="no reader recognises this model"):
        BilinearTensor.from_model(nn.Sequential(nn.Linear(2, 2)), 0)


# ---------------------------------------------------------------------- modules


def test_tl_components():
    model = bilinear_model(bilinear_bias=True)
    in_model = BilinearTensor.from_mlp(model.blocks[1].mlp)
    assert torch.equal(in_model.left, BilinearTensor.from_model(model, 1).left)
    assert in_model.input_space is None
    alone = BilinearMLP(config())
    for weight in alone.parameters():
        nn.init.normal_(weight)
    x = torch.randn(4, 16)
    tensor = BilinearTensor.from_mlp(alone)
    assert not tensor.has_biases
    assert_close(tensor(x), alone(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="this MLP is not bilinear"):
        BilinearTensor.from_mlp(MLP(HookedTransformerConfig(**config(act_fn="gelu"))))


class LeftRightOut(nn.Module):
    """What most people write, with the variations that must not be misread."""

    def __init__(self, bias=False, act=None, norm=False, residual=False, dropout=0.0, width=6):
        super().__init__()
        self.left = nn.Linear(width, 9, bias=bias)
        self.right = nn.Linear(width, 9, bias=bias)
        self.out = nn.Linear(9, width, bias=bias)
        self.norm, self.residual, self.f = norm, residual, act or (lambda x: x)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        y = torch.nn.functional.normalize(x, dim=-1) * 6**0.5 if self.norm else x
        y = self.out(self.dropout(self.f(self.left(y)) * self.right(y)))
        return x + y if self.residual else y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_left_right_out(bias, dtype):
    module = LeftRightOut(bias=bias, dropout=0.5).to(dtype)
    before = torch.random.get_rng_state()
    tensor = BilinearTensor.from_mlp(module)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert module.training
    assert module.dropout.training
    assert tensor.has_biases == bias
    assert tensor.left.shape == (9, 6)
    x = torch.randn(5, 6, dtype=dtype)
    assert_close(
        tensor(x).to(dtype),
        module.eval()(x),
        **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "variation",
    [{"act": torch.relu}, {"act": nn.functional.silu}, {"norm": True}, {"residual": True}],
    ids=["relu", "silu", "norm", "residual"],
)
def test_a_forward_that_computes_something_else_is_refused(variation, dtype):
    module = LeftRightOut(**variation).to(dtype)
    with pytest.raises(ValueError, match="its forward computes something else"):
        BilinearTensor.from_mlp(module)


def test_a_forward_that_cannot_be_compared_is_refused():
    class TwoInputs(LeftRightOut):
        def forward(self, x, y):
            return self.out(self.left(x) * self.right(y))

    class ReturnsTuple(LeftRightOut):
        def forward(self, x):
            return super().forward(x), None

    class Pools(LeftRightOut):
        def forward(self, x):
            return super().forward(x).mean(1)

    for module, message in (
        (TwoInputs(), r"could not be run on an input of shape \[1, 8, 6\]"),
        (ReturnsTuple(), "returns a tuple"),
        (Pools(), r"returns shape \[1, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            BilinearTensor.from_mlp(module)


def test_containers_without_a_forward():
    t = {"left": torch.randn(9, 6), "right": torch.randn(9, 6), "out": torch.randn(4, 9)}
    module = nn.Module()
    for name, value in t.items():
        module.register_parameter(name, nn.Parameter(value))
    module.register_buffer("bias_left", torch.zeros(9))
    module.bias_out = nn.Parameter(torch.zeros(4))
    tensor = BilinearTensor.from_mlp(module)
    assert torch.equal(tensor.out, t["out"])
    assert tensor.bias_left is None
    assert tensor.bias_out is not None


@pytest.mark.parametrize("hidden", [9, 6])
def test_tensors_in_tl_layout(hidden):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.W_gate = nn.Parameter(torch.randn(6, hidden))
            self.W_in = nn.Parameter(torch.randn(6, hidden))
            self.W_out = nn.Parameter(torch.randn(hidden, 6))
            self.b_in = nn.Parameter(torch.randn(hidden))

        def forward(self, x):
            return ((x @ self.W_gate) * (x @ self.W_in + self.b_in)) @ self.W_out

    class AfterTheProduct(Layer):
        def forward(self, x):
            return ((x @ self.W_gate) * (x @ self.W_in) + self.b_in) @ self.W_out

    module = Layer()
    tensor = BilinearTensor.from_mlp(module)
    x = torch.randn(5, 6)
    assert_close(tensor(x), module(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="computes something else"):
        BilinearTensor.from_mlp(AfterTheProduct())


@pytest.mark.parametrize("bias", [False, True])
def test_hugging_face_llama(bias):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {
        "hidden_size": 6,
        "intermediate_size": 10,
        "num_attention_heads": 2,
        "mlp_bias": bias,
    }
    mlp = LlamaMLP(LlamaConfig(hidden_act="linear", **sizes))
    tensor = BilinearTensor.from_mlp(mlp)
    assert torch.equal(tensor.left, mlp.gate_proj.weight)
    assert torch.equal(tensor.right, mlp.up_proj.weight)
    x = torch.randn(3, 6)
    assert_close(tensor(x), mlp(x))
    assert tensor.has_biases == bias
    with pytest.raises(ValueError, match=r"this LlamaMLP is not bilinear: its act_fn is SiLU"):
        BilinearTensor.from_mlp(LlamaMLP(LlamaConfig(hidden_act="silu", **sizes)))


def test_modules_nobody_reads():
    with pytest.raises(TypeError, match="no reader recognises this MLP"):
        BilinearTensor.from_mlp(nn.Linear(2, 2))


# ---------------------------------------------------------------------- maps under other names


class Renamed(nn.Module):
    """A layer with names of its own; ``outer`` holds it one level down."""

    def __init__(self, bias=True, act=None, d_out=6):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(6, 9, bias=bias) for _ in range(2))
        self.w2 = nn.Linear(9, d_out, bias=bias)
        self.f = act or (lambda x: x)

    def forward(self, x):
        return self.w2(self.f(self.w1(x)) * self.w3(x))


class Fused(nn.Module):
    """Phi-3's layout, under its names or others."""

    def __init__(self, names=("gate_up_proj", "down_proj"), alternating=False, bias=True):
        super().__init__()
        self.names, self.alternating = names, alternating
        self.add_module(names[0], nn.Linear(6, 18, bias=bias))
        self.add_module(names[1], nn.Linear(9, 4, bias=bias))

    def forward(self, x):
        both = getattr(self, self.names[0])(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.alternating else both.chunk(2, dim=-1)
        return getattr(self, self.names[1])(up * gate)


class Bare(nn.Module):
    def __init__(self, a=(8, 5), c=(3, 8)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b, self.c = (
            nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in (a, a, c)
        )

    def forward(self, x):
        return ((x @ self.a.T) * (x @ self.b.T)) @ self.c.T


def test_bare_parameters_under_any_names():
    module = Bare()
    tensor = BilinearTensor.from_mlp(module, maps=("a", "b", "c"))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(tensor(x), module(x).detach())
    assert tensor.left.data_ptr() != module.a.data_ptr()
    with pytest.raises(ValueError, match=r"has no linear map 'd'.*it has a, b, c"):
        BilinearTensor.from_mlp(module, maps=("a", "b", "d"))
    with pytest.raises(ValueError, match="forward"):
        BilinearTensor.from_mlp(module, maps=("a", "a", "c"))


@pytest.mark.parametrize("bias", [False, True])
def test_maps_under_any_names(bias):
    module, x = Renamed(bias), torch.randn(5, 6)
    with pytest.raises(TypeError, match="no reader recognises this MLP"):
        BilinearTensor.from_mlp(module)
    tensor = BilinearTensor.from_mlp(module, maps=("w1", "w3", "w2"))
    assert torch.equal(tensor.left, module.w1.weight)
    assert torch.equal(tensor.right, module.w3.weight)
    assert tensor.has_biases == bias
    assert_close(tensor(x), module(x))
    nested = BilinearTensor.from_mlp(nn.Sequential(module), maps=("0.w1", "0.w3", "0.w2"))
    assert torch.equal(nested.out, tensor.out)


@pytest.mark.usefixtures("unchecked")
def test_names_say_which_map_is_which():
    with pytest.raises(ValueError, match="left and right must"):
        BilinearTensor.from_mlp(Renamed(), maps=("w1", "w2", "w3"))
    with pytest.raises(ValueError, match="its forward computes something else"):
        BilinearTensor.from_mlp(Renamed(act=torch.relu), maps=("w1", "w3", "w2"))
    with pytest.raises(
        ValueError, match=r"no linear map 'gate', 'w4'; it has w1, w3, w2; name three"
    ):
        BilinearTensor.from_mlp(Renamed(), maps=("gate", "w4", "w2"))
    for wrong in ("w1", ("w1",), ("w1", "w2", "w3", "w4")):
        with pytest.raises(ValueError, match=r"maps are three names \(left, right, out\), or two"):
            BilinearTensor.from_mlp(Renamed(), maps=wrong)


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_matrix(bias):
    x = torch.randn(5, 6)
    for module, maps in (
        (Fused(bias=bias), None),
        (Fused(("w", "p"), bias=bias), ("w", "p")),
    ):
        tensor = BilinearTensor.from_mlp(module, maps)
        assert (tensor.d_in, tensor.d_hidden, tensor.d_out) == (6, 9, 4)
        assert tensor.has_biases == bias
        assert_close(tensor(x), module(x))
    with pytest.raises(ValueError, match="its forward computes something else"):
        BilinearTensor.from_mlp(Fused(alternating=True))
    odd = nn.Module()
    odd.gate_up_proj, odd.down_proj = nn.Linear(6, 9), nn.Linear(9, 4)
    with pytest.raises(ValueError, match="gate_up_proj has 9 rows: left and right take half"):
        BilinearTensor.from_mlp(odd)


def test_hugging_face_phi3():
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    mlp = Phi3MLP(Phi3Config(hidden_size=6, intermediate_size=10, hidden_act="linear"))
    x = torch.randn(3, 6)
    assert_close(BilinearTensor.from_mlp(mlp)(x), mlp(x))
    with pytest.raises(ValueError, match="this Phi3MLP is not bilinear: its activation_fn is SiLU"):
        BilinearTensor.from_mlp(Phi3MLP(Phi3Config(hidden_size=6, intermediate_size=10)))


@pytest.mark.parametrize("d_out", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("d_in", [1, 2, 5])
def test_torch_bilinear(d_in, d_out):
    """Exact, in as few hidden neurons as rows of the slices or pairs of inputs."""
    module = nn.Bilinear(d_in, d_in, d_out, bias=d_out != 2, dtype=torch.float64)
    tensor = BilinearTensor.from_mlp(module)
    assert tensor.d_hidden == min(d_out * d_in, d_in * (d_in + 1) // 2)
    assert tensor.has_biases == (d_out != 2)
    x = torch.randn(7, d_in, dtype=torch.float64)
    assert_close(tensor(x), module(x, x), rtol=1e-12, atol=1e-12)
    weight = module.weight.detach()
    assert torch.equal(tensor.dense(), (weight + weight.mT) / 2)


def test_torch_bilinear_of_two_inputs():
    with pytest.raises(ValueError, match="this Bilinear has inputs of 3 and 4 dimensions"):
        BilinearTensor.from_mlp(nn.Bilinear(3, 4, 2))


def test_weights_are_checked_once(monkeypatch):
    """Checking reads every entry of every factor."""
    made = []
    check = BilinearTensor.__post_init__
    monkeypatch.setattr(
        BilinearTensor, "__post_init__", lambda self: (made.append(self), check(self))[0]
    )
    hooked = bilinear_model()
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_act="linear",
            vocab_size=9,
            hidden_size=8,
            intermediate_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    for model in (hooked, llama):
        tensor = BilinearTensor.from_model(model, 0)
        assert tensor.output_space == "blocks.0.hook_mlp_out"
        assert tensor.input_space.startswith(
            "blocks.0.mlp.hook_in (input of the MLP, after RMSNorm"
        )
        assert made.pop() is tensor
        assert not made
