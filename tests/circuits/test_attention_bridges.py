"""Which of TransformerLens's bridges attention scores are read of. Runs on 3.9, and on 4 without
SAELens.

Tiny models of Hugging Face's classes with every weight random, as TransformerBridge wraps them. Where a
class normalises or turns in float32 whatever its dtype (`RMS`), float64 scores are only that exact
themselves.
"""

import importlib.metadata
import logging

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_bilinear import Dictionary
from tl_bilinear.circuits import AttentionInteractions, embedding
from tl_bilinear.models.heads import UnreadAttention

HOOKED_TRANSFORMER = importlib.metadata.version("transformer-lens") < "4"
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
D = 16
NONE = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager"}
SIZES = {
    "vocab_size": 23,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    **NONE,
}
GPT2 = {"vocab_size": 23, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 24}
GPT2 |= NONE
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}

RMS, EXACT = 1e-6, 1e-10
COVERED = {
    # architecture: (config, fields, how positions enter, float64 tolerance)
    "BloomForCausalLM": (
        "BloomConfig",
        {"vocab_size": 23, "hidden_size": D, "n_layer": 2, "n_head": 4, **NONE},
        "ALiBi",
        EXACT,
    ),
    "FalconForCausalLM": (
        "FalconConfig",
        {**SIZES, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
        "half-rotated",
        EXACT,
    ),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, "none of its own", EXACT),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", GPT2, "none of its own", EXACT),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES, "half-rotated", EXACT),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {**WIDE, "query_pre_attn_scalar": 5},
        "half-rotated",
        RMS,
    ),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        {**WIDE, "query_pre_attn_scalar": 5},
        "half-rotated",
        RMS,
    ),
    "GemmaForCausalLM": ("GemmaConfig", WIDE, "half-rotated", RMS),
    "GlmForCausalLM": ("GlmConfig", WIDE, "adjacent", RMS),
    "GraniteForCausalLM": (
        "GraniteConfig",
        {**GROUPED, "attention_multiplier": 0.3},
        "rotary",
        RMS,
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**GROUPED, "attention_bias": True}, "half-rotated", RMS),
    "MistralForCausalLM": ("MistralConfig", GROUPED, "half-rotated", RMS),
    "MptForCausalLM": (
        "MptConfig",
        {"vocab_size": 23, "d_model": D, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
        "ALiBi",
        EXACT,
    ),
    "Olmo2ForCausalLM": ("Olmo2Config", GROUPED, "half-rotated", RMS),
    "OlmoForCausalLM": ("OlmoConfig", GROUPED, "half-rotated", RMS),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED, "half-rotated", RMS),
    "PhiForCausalLM": ("PhiConfig", SIZES, "rotary", EXACT),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED, "half-rotated", RMS),
    "Qwen3ForCausalLM": ("Qwen3Config", WIDE, "half-rotated", RMS),
    "SmolLM3ForCausalLM": ("SmolLM3Config", GROUPED, "half-rotated", RMS),
    "StableLmForCausalLM": ("StableLmConfig", GROUPED, "rotary", EXACT),
    "Starcoder2ForCausalLM": ("Starcoder2Config", GROUPED, "half-rotated", EXACT),
}
FLOAT32 = {
    "GptOssForCausalLM": (
        "GptOssConfig",
        {**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1},
        "half-rotated",
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 2}, "half-rotated"),
}
if HOOKED_TRANSFORMER:  # 3.9 does not turn the pairs of coordinates that Cohere turns
    COHERE = {"CohereForCausalLM": ("CohereConfig", GROUPED, "how its rotary positions turn")}
else:
    COHERE = {}
    COVERED["CohereForCausalLM"] = ("CohereConfig", GROUPED, "adjacent", RMS)
NO_SCORES = "holds what softmax makes of the scores"
REFUSED = COHERE | {
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {
            **SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 8,
        },
        "",
    ),
    "GPTJForCausalLM": ("GPTJConfig", {**GPT2, "rotary_dim": 4}, NO_SCORES),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {
            "vocab_size": 23,
            "hidden_size": D,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 32,
            "intermediate_size": 24,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            **NONE,
        },
        NO_SCORES,
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 23, "hidden_size": D, "num_hidden_layers": 2, "state_size": 4},
        "the layer has no attention",
    ),
    "OPTForCausalLM": (
        "OPTConfig",
        {
            "vocab_size": 23,
            "hidden_size": D,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 24,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": D,
            **NONE,
        },
        NO_SCORES,
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "vocab_size": 23,
            "d_model": D,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "it has no blocks",
    ),
}


def bridge(architecture, config, fields, dtype):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    cfg = getattr(transformers, config)(**fields)
    model = getattr(transformers, architecture)(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = any(part in name for part in ("norm", "ln_"))
            scale = is_norm and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if scale else 0.3 * noise)
    return build_bridge_from_module(
        model.to(dtype), architecture, hf_config=cfg, dtype=dtype, device="cpu"
    )


def assert_reads(built, tolerance, positions=None):
    """Scores of two heads of layer 1, as sums over embeddings and a dictionary that encodes."""
    rows = torch.randn(20, D, generator=torch.Generator().manual_seed(3)).to(
        next(built.parameters()).dtype
    )
    other = Dictionary(rows, encode=lambda x: (x @ rows.T.to(x)).relu())
    for head in (0, 3):
        interactions = AttentionInteractions(built, 1, head, embedding(built), other)
        assert positions is None or positions in interactions.positions
        run = interactions.run(TOKENS)
        for i, j in ((0, 0), (5, 2), (7, 6), (7, 7)):
            found = run.score(i, j)
            assert_close(found.total, found.measured, rtol=tolerance, atol=tolerance)
    return run


@pytest.mark.parametrize("architecture", COVERED)
def test_covered(architecture):
    config, fields, positions, exact = COVERED[architecture]
    built = bridge(architecture, config, fields, torch.float64)
    assert_reads(built, exact, positions)
    assert_reads(bridge(architecture, config, fields, torch.float32), 1e-5, positions)


@pytest.mark.parametrize("architecture", FLOAT32)
def test_covered_in_float32(architecture):
    """Their experts run in no other dtype of these."""
    config, fields, positions = FLOAT32[architecture]
    assert_reads(bridge(architecture, config, fields, torch.float32), 1e-5, positions)


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_by_name(architecture):
    config, fields, why = REFUSED[architecture]
    built = bridge(architecture, config, fields, torch.float32)
    with pytest.raises(
        UnreadAttention, match=f"attention scores of {architecture} .*not read.*{why}"
    ):
        AttentionInteractions(built, 1, 0, torch.eye(D))


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"]
)
def test_compatibility_mode(architecture):
    config, fields, positions, _ = COVERED[architecture]
    built = bridge(architecture, config, fields, torch.float32)
    built.enable_compatibility_mode(disable_warnings=True)
    assert_reads(built, 1e-5, positions)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM"]
)
def test_interventions(architecture):
    config, fields, *_ = COVERED[architecture]
    run = assert_reads(bridge(architecture, config, fields, torch.float64), 1e-6)
    found = run.verify(7, 3, k=2, progress=False)
    assert float(found.measured.abs().max()) > 1e-3
    assert found.difference < 1e-5
