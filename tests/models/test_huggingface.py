"""from_hf, to_hf and the reader: a Hugging Face Llama and a HookedTransformer compute the same."""

import json

import pytest
import torch
from sae_lens import HookedSAETransformer
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from tests.models.building import TOKENS, bilinear_model, reference_mlp
from tl_bilinear import BilinearTensor, HookedBilinearTransformer
from tl_bilinear.models import HookedBilinearSAETransformer

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_act": "linear",
}
BIASES = {"mlp_bias": True, "attention_bias": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
CONFIGS = [
    {},
    {"mlp_bias": True},
    {"attention_bias": True},
    BIASES,
    {"num_key_value_heads": 2, **BIASES},
    {"num_key_value_heads": 1},
    {"tie_word_embeddings": True, **BIASES},
    {"head_dim": 6},
    {"intermediate_size": 16},
    {"rms_norm_eps": 0.3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    {"rope_parameters": LLAMA3},
    {"vocab_size": 16},
]
from_hf = HookedBilinearTransformer.from_hf


def llama(**fields):
    """Every weight, bias and norm weight random."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.5 * noise if "norm" in name else 0.3 * noise)
    return model


def tokens(model):
    return TOKENS % model.config.vocab_size


def assert_same_logits(given, expected, ids):
    expected = expected(ids).logits
    assert expected.std() > 0.3  # a model that says something
    assert_close(given(ids), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- from Hugging Face


@pytest.mark.parametrize("fold_ln", [True, False])
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_logits_there_and_back(fields, fold_ln):
    hf = llama(**fields)
    before = {name: p.clone() for name, p in hf.state_dict().items()}
    model = from_hf(hf, fold_ln=fold_ln, device="cpu")
    assert_same_logits(model, hf, tokens(hf))
    assert model.cfg.normalization_type == ("RMSPre" if fold_ln else "RMS")
    back = model.to_hf()
    assert type(back) is LlamaForCausalLM
    assert_close(back(tokens(hf)).logits, hf(tokens(hf)).logits, rtol=0, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in hf.state_dict().items())
    if not fold_ln:
        for name, p in back.state_dict().items():
            assert torch.equal(p, before[name]), name
        assert back.config.tie_word_embeddings == hf.config.tie_word_embeddings
        for field in ("num_key_value_heads", "rope_parameters", "mlp_bias", "attention_bias"):
            assert getattr(back.config, field) == getattr(hf.config, field)


def test_the_convention_is_the_layers_formula():
    hf = llama(**BIASES)
    x = torch.randn(3, 16)
    model = from_hf(hf, fold_ln=False)
    assert_close(hf.model.layers[1].mlp(x), reference_mlp(model.blocks[1].mlp, x).float())
    assert torch.equal(model.W_gate[1], hf.model.layers[1].mlp.gate_proj.weight.T)


def test_hooks_gradients_and_processing_work_afterwards():
    model = from_hf(llama(**BIASES))
    _, cache = model.run_with_cache(TOKENS)
    normalised = cache["blocks.1.ln2.hook_normalized"]
    assert torch.equal(cache["blocks.1.mlp.hook_in"], normalised)  # no weight between them
    tensor = BilinearTensor.from_model(model, 1)
    assert_close(tensor(normalised), cache["blocks.1.hook_mlp_out"], rtol=1e-4, atol=1e-5)
    expected = model(TOKENS).log_softmax(-1)
    model(TOKENS, return_type="loss").backward()
    assert model.blocks[0].mlp.b_gate.grad.norm() > 0
    model.process_weights_()
    assert_close(model(TOKENS).log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_untrained_biases_are_buffers():
    model = from_hf(llama())
    assert "blocks.0.mlp.b_in" not in dict(model.named_parameters())
    assert "blocks.0.mlp.b_in" in dict(from_hf(llama(mlp_bias=True)).named_parameters())


def test_random_numbers_are_left_alone(tmp_path):
    hf = llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    from_hf(hf).to_hf(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_the_class_is_kept():
    hf = llama()
    model = HookedBilinearSAETransformer.from_hf(hf)
    assert isinstance(model, HookedSAETransformer)
    assert_same_logits(model, hf, TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    hf = llama(**BIASES).to(dtype)
    model = from_hf(hf)
    assert model.cfg.dtype == model.W_in.dtype == model.b_gate.dtype == dtype
    # Llama's RMSNorm computes in float32 whatever the dtype.
    atol = 0.3 if dtype == torch.bfloat16 else 1e-5
    assert_close(model(TOKENS), hf(TOKENS).logits, rtol=0, atol=atol)
    wide = from_hf(hf, dtype=torch.float32)
    assert wide.cfg.dtype == wide.W_in.dtype == torch.float32
    assert model.to_hf().dtype == dtype


# ---------------------------------------------------------------------- folders and tokenizers


def make_tokenizer(words=20, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[UNK]", "[BOS]", "[EOS]", "cat", "sat", *(f"w{i}" for i in range(words - 5))]
    tokens = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    names = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


@pytest.mark.parametrize("marked", [False, True], ids=["in memory", "add_bos_token"])
def test_a_tokenizer_goes_into_a_folder_and_comes_back(tmp_path, marked):
    """One made in memory has no name, by which TransformerLens would read it again."""
    special = {"add_bos_token": True, "name_or_path": ""} if marked else {}
    hf = llama()
    model = from_hf(hf, tokenizer=make_tokenizer(**special))
    assert model.to_tokens("cat sat").tolist() == [[1, 3, 4]]
    assert model.to_tokens("cat sat", prepend_bos=False).tolist() == [[3, 4]]
    written = model.to_hf(tmp_path / "llama")
    assert written.config.bos_token_id == 1
    again = from_hf(tmp_path / "llama")
    assert again.to_tokens("cat sat").tolist() == [[1, 3, 4]]
    assert_same_logits(again, hf, TOKENS)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(read) is LlamaForCausalLM
    assert_close(read(TOKENS).logits, written(TOKENS).logits)
    (tmp_path / "llama" / "tokenizer.json").write_text("{")  # not read where one is given
    given = from_hf(str(tmp_path / "llama"), tokenizer=make_tokenizer(7))
    assert len(given.tokenizer) == 7


def test_a_tokenizer_that_does_not_fit():
    with pytest.raises(ValueError, match="tokenizer has 24 entries and the model embeds 23"):
        from_hf(llama(), tokenizer=make_tokenizer(24))


def test_a_folder_is_replaced_whole_and_anything_else_refused(tmp_path):
    model = from_hf(llama())
    model.to_hf(tmp_path / "llama")
    other = from_hf(llama(mlp_bias=True))
    other.to_hf(tmp_path / "llama")
    assert_close(from_hf(tmp_path / "llama")(TOKENS), other(TOKENS))
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    (tmp_path / "llama" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        model.to_hf(tmp_path / "llama")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(FileExistsError, match=r"config\.json"):
        model.to_hf(tmp_path / "ours")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = from_hf(llama())
    model.to_hf(tmp_path / "llama")

    def full(self, folder, **kwargs):
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        from_hf(llama(mlp_bias=True)).to_hf(tmp_path / "llama")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    assert_close(from_hf(tmp_path / "llama")(TOKENS), model(TOKENS))


def test_other_folders_are_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        from_hf(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_ty')
    with pytest.raises(ValueError, match="is not JSON, or not all of it"):
        from_hf(tmp_path / "empty")
    bilinear_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(
        ValueError, match=r"load it with HookedBilinearTransformer\.from_pretrained"
    ):
        from_hf(tmp_path / "ours")
    MistralConfig().save_pretrained(tmp_path / "mistral")
    with pytest.raises(TypeError, match="'mistral' model; expected a Llama"):
        from_hf(tmp_path / "mistral")


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
def test_a_llama_that_is_not_bilinear(tmp_path, activation):
    hf = llama(hidden_act=activation)
    hf.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()  # refused before weights are read
    for source in (hf, tmp_path / "llama"):
        with pytest.raises(ValueError, match="is not bilinear: its gate goes through") as caught:
            from_hf(source)
        assert "`tl-bilinear finetune`" in str(caught.value)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp is not bilinear.*finetune"):
        BilinearTensor.from_model(hf, 1)


def test_weights_decide_not_the_config():
    """A gate that was annealed to the identity is bilinear, and a forward of its own is not."""
    hf = llama(hidden_act="silu")
    for layer in hf.model.layers:
        layer.mlp.act_fn = nn.Identity()
    assert_same_logits(from_hf(hf), hf, TOKENS)
    hf.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match="forward computes something else"):
        from_hf(hf)


def test_what_is_not_a_llama():
    with pytest.raises(TypeError, match=r"from_hf takes a LlamaForCausalLM.*not torch.nn.*Linear"):
        from_hf(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LlamaModel"):
        from_hf(llama().model)


def test_rotary_embeddings_that_differ():
    dynamic = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type 'dynamic' is not supported"):
        from_hf(llama(rope_parameters=dynamic))


# ---------------------------------------------------------------------- to Hugging Face

ROTARY = {"positional_embedding_type": "rotary"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bilinear_bias": True},
        {"normalization_type": "RMSPre", "bilinear_bias": True},
        {"n_key_value_heads": 1},
        {"attn_scale": 1.7},
        {"use_attn_scale": False},
        {"d_head": 4, "n_heads": 2},
        {"rotary_base": 30},
        {"eps": 0.2},
    ],
    ids=str,
)
def test_a_hooked_transformer_as_llama(fields):
    model = bilinear_model(**ROTARY, **fields)
    with torch.no_grad():
        model.unembed.b_U.zero_()
    hf = model.to_hf()
    assert_same_logits(model, hf, TOKENS)
    again = from_hf(hf)
    assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=2e-5)


def test_a_processed_model_as_llama():
    model = bilinear_model(**ROTARY, bilinear_bias=True)
    with torch.no_grad():
        model.unembed.b_U.zero_()
    model.process_weights_(center_writing_weights=False)
    hf = model.to_hf()
    assert_same_logits(model, hf, TOKENS)
    assert all((p == 1).all() for name, p in hf.named_parameters() if "norm" in name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "positional_embedding_type='standard' .there: 'rotary'."),
        ({"normalization_type": "LN", **ROTARY}, "normalization_type='LN'"),
        ({"parallel_attn_mlp": True, **ROTARY}, "parallel_attn_mlp=True .there: False."),
        ({"rotary_dim": 4, **ROTARY}, "rotary_dim=4 .there: 8."),
        ({"rotary_adjacent_pairs": True, **ROTARY}, "rotary_adjacent_pairs=True"),
        ({"d_vocab_out": 5, **ROTARY}, "d_vocab_out=5 .there: 23."),
        ({"output_logits_soft_cap": 3.0, **ROTARY}, "output_logits_soft_cap=3"),
        (ROTARY, "b_U of the unembedding that is not zero"),
    ],
    ids=str,
)
def test_settings_that_a_llama_does_not_have(fields, message):
    with pytest.raises(
        ValueError, match=f"LlamaForCausalLM cannot express this model: .*{message}"
    ):
        bilinear_model(**fields).to_hf()


# ---------------------------------------------------------------------- the reader


@pytest.mark.parametrize("fields", [{}, BIASES], ids=["bare", "biased"])
def test_a_layer_is_read_as_from_the_hooked_transformer(fields):
    hf = llama(**fields)
    model = from_hf(hf, fold_ln=False)
    for layer in (0, 1):
        tensor, expected = (
            BilinearTensor.from_model(hf, layer),
            BilinearTensor.from_model(model, layer),
        )
        for name in ("left", "right", "out", "bias_left", "bias_right", "bias_out"):
            given = getattr(tensor, name)
            assert (
                given is None
                if fields == {} and "bias" in name
                else torch.equal(given, getattr(expected, name))
            )
        assert (tensor.input_space, tensor.output_space) == (
            expected.input_space,
            expected.output_space,
        )
    assert torch.equal(BilinearTensor.from_model(hf, -1).left, tensor.left)
    assert torch.equal(BilinearTensor.from_model(hf.model, 1).left, tensor.left)


def test_a_norm_without_weights_is_named_so():
    hf = llama()
    assert "after RMSNorm and its weight" in BilinearTensor.from_model(hf, 0).input_space
    with torch.no_grad():
        hf.model.layers[0].post_attention_layernorm.weight.fill_(1)
    folded = BilinearTensor.from_model(from_hf(hf), 0)
    tensor = BilinearTensor.from_model(hf, 0)
    assert tensor.input_space == folded.input_space
    assert "without a weight" in tensor.input_space
    assert torch.equal(tensor.left, folded.left)


def test_which_layer():
    with pytest.raises(ValueError, match="this model has 2 layers: say which one"):
        BilinearTensor.from_model(llama())
    with pytest.raises(IndexError, match="layer 2 does not exist"):
        BilinearTensor.from_model(llama(), 2)


def test_a_real_pretrained_llama_is_refused_and_its_bilinear_twin_converted(shared_data, tmp_path):
    """Grouped queries, tied embeddings and a tokenizer as somebody else wrote them."""
    source = shared_data / "stories260K"
    with pytest.raises(ValueError, match="finetune"):
        from_hf(source)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "hidden_act": "linear"}))
    model = from_hf(tmp_path)
    hf = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = model.to_tokens("Once upon a time, there was a little girl named Lily.")
    assert ids.shape[1] > 8
    assert_close(model(ids), hf(ids).logits, rtol=0, atol=1e-4)
