"""A tensor transformer that transformers trains: its parameters have the published names.

`TensorLanguageModel` is the training and storage format, `TensorTransformer` (hooked) is for analysis;
they share the format, not the forward pass. Its folders are read by `TensorTransformer.from_pretrained`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tl_bilinear.models.tensor_format import (
    FIELD_NAMES,
    LOGIT_CAP,
    TensorFields,
    rms_normed,
    rotary_tables,
)
from tl_bilinear.tensor.product_head import rotated

MODEL_TYPE = "tl-bilinear-tensor-transformer"


class TensorLanguageConfig(PretrainedConfig):
    """The fields of `TensorFields`, as transformers keeps them."""

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_ctx",
    }

    def __init__(self, **given: Any) -> None:
        own = {name: given.pop(name) for name in FIELD_NAMES if name in given}
        for name, value in vars(TensorFields(**own)).items():
            setattr(self, name, value)
        super().__init__(**{"tie_word_embeddings": False, "use_cache": False, **given})

    @property
    def tensor_fields(self) -> TensorFields:
        return TensorFields(**{name: getattr(self, name) for name in FIELD_NAMES})


class _Attention(nn.Module):
    c_q: nn.Linear
    c_k: nn.Linear
    c_v: nn.Linear
    c_proj: nn.Linear
    c_q2: nn.Linear
    c_k2: nn.Linear

    def __init__(self, fields: TensorFields) -> None:
        super().__init__()
        self.fields = fields
        names = ["c_q", "c_k", "c_v", "c_proj", *(["c_q2", "c_k2"] if fields.bilinear_attn else [])]
        for name in names:
            setattr(self, name, nn.Linear(fields.n_embd, fields.n_embd, bias=False))
        self.lamb = nn.Parameter(torch.tensor(0.5))
        if fields.attention == "difference":
            self.bilinear_lamb = nn.Parameter(torch.tensor(0.8))

    def forward(
        self, x: Tensor, v1: Tensor | None, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape

        def heads(linear: nn.Linear) -> Tensor:
            return linear(x).view(batch, length, self.fields.n_head, -1).transpose(1, 2)

        def turned(linear: nn.Linear) -> Tensor:
            rows = heads(linear)
            return rotated(rms_normed(rows) if self.fields.norm else rows, *tables).to(rows.dtype)

        def scores(query: nn.Linear, key: nn.Linear) -> Tensor:
            return turned(query) @ turned(key).mT / self.fields.d_head

        value = heads(self.c_v)
        v1 = value if v1 is None else v1
        value = (1 - self.lamb) * value + self.lamb * v1
        first = scores(self.c_q, self.c_k)
        second = scores(self.c_q2, self.c_k2) if self.fields.bilinear_attn else None
        z = self._pattern(first, second) @ value
        return self.c_proj(z.transpose(1, 2).reshape(batch, length, width)), v1

    def _pattern(self, first: Tensor, second: Tensor | None) -> Tensor:
        causal = torch.ones(first.shape[-2:], dtype=torch.bool, device=first.device).tril()
        if self.fields.attention == "product":
            assert second is not None
            return (first * second).masked_fill(~causal, 0)
        if self.fields.attention == "squared":
            pattern = first.square().masked_fill(~causal, 0)
            return pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9)
        if second is None:
            hidden = (first * self.fields.d_head**0.5).masked_fill(~causal, -torch.inf)
            return hidden.softmax(-1)
        one, other = (s.masked_fill(~causal, -torch.inf).softmax(-1) for s in (first, second))
        return one - self.bilinear_lamb * other


class _BilinearMLP(nn.Module):
    def __init__(self, fields: TensorFields) -> None:
        super().__init__()
        self.gated = fields.gated
        self.Left = nn.Linear(fields.n_embd, fields.d_mlp, bias=False)
        self.Right = nn.Linear(fields.n_embd, fields.d_mlp, bias=False)
        self.Down = nn.Linear(fields.d_mlp, fields.n_embd, bias=False)
        self.Down_bias = nn.Parameter(torch.zeros(fields.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.Left(x)
        return self.Down((F.silu(gate) if self.gated else gate) * self.Right(x)) + self.Down_bias


class _SquaredMLP(nn.Module):
    def __init__(self, fields: TensorFields) -> None:
        super().__init__()
        self.squared = fields.squared_mlp
        self.c_fc = nn.Linear(fields.n_embd, fields.d_mlp, bias=False)
        self.c_proj = nn.Linear(fields.d_mlp, fields.n_embd, bias=False)
        self.bias = nn.Parameter(torch.zeros(fields.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        return self.c_proj((hidden if self.squared else hidden.relu()).square()) + self.bias


class _Block(nn.Module):
    def __init__(self, fields: TensorFields) -> None:
        super().__init__()
        self.norm = rms_normed if fields.norm else nn.Identity()
        self.attn = _Attention(fields)
        self.mlp = _BilinearMLP(fields) if fields.bilinear else _SquaredMLP(fields)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(
        self, x: Tensor, x0: Tensor, v1: Tensor | None, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        attended, v1 = self.attn(self.norm(x), v1, tables)
        x = x + attended
        return x + self.mlp(self.norm(x)), v1


class TensorLanguageModel(PreTrainedModel, GenerationMixin):
    """A tensor transformer as a module of transformers; initial weights as in the published code."""

    config_class = TensorLanguageConfig
    base_model_prefix = "transformer"

    def __init__(self, config: TensorLanguageConfig) -> None:
        super().__init__(config)
        fields = config.tensor_fields
        self.fields = fields
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(fields.vocab_size, fields.n_embd),
                "h": nn.ModuleList(_Block(fields) for _ in range(fields.n_layer)),
            }
        )
        self.lm_head = nn.Linear(fields.n_embd, fields.vocab_size, bias=False)
        self.post_init()
        self.generation_config.use_cache = False  # there is no cache of keys

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own, and zeros for what writes to the stream (`zero_writers`)."""

    def zero_writers(self) -> None:
        """Zero the maps that write to the residual stream, and the unembedding, as training starts."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("c_proj.weight", "Down.weight", "lm_head.weight")):
                    parameter.zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Logits, and the mean loss of `labels` where they are given; -100 is not counted.

        Raises ValueError for an attention mask that leaves tokens out.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("padded text is not supported: give rows of one length")
        cos, sin = rotary_tables(input_ids.shape[1], self.fields.d_head)
        tables = cos.to(input_ids.device), sin.to(input_ids.device)
        x = rms_normed(self.transformer["wte"](input_ids))
        x0, v1 = x, None
        blocks: Any = self.transformer["h"]
        for block in blocks:
            x, v1 = block(x, x0, v1, tables)
        logits = self.lm_head(rms_normed(x) if self.fields.norm else x).float()
        if self.fields.norm:
            logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        loss = None
        if labels is not None:
            count = options.get("num_items_in_batch")
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten(),
                reduction="mean" if count is None else "sum",
            )
            loss = loss if count is None else loss / count
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """The whole text each time."""
        return {"input_ids": input_ids}
