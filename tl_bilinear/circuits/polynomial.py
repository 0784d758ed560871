"""A tensor transformer as one polynomial of its embeddings, from its factors.

Attention by products and bilinear MLPs are polynomials of the stream, and so is a whole model without
norms: of degree ``10^L`` in the embeddings for L layers (five times the degree in attention, twice in
the MLP). With norms it is one for each text, every norm's scale held at what it is there.

>>> polynomial = tensor_polynomial(model)               # a model trained with norm=False
>>> polynomial(x0)                                      # logits of embeddings x0 [pos, d_model]
>>> polynomial.by_degree(x0).shape                      # [degree + 1, pos, d_vocab]; they sum to it
>>> tensor_polynomial(normed_model, tokens)             # the norms' scales held
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.circuits.upstream import as_tokens
from tl_bilinear.features.passage import refuse_attached
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearTensor
from tl_bilinear.tensor.product_head import ProductHead, rotated


@dataclass(frozen=True, eq=False)
class TensorPolynomial(Result):
    """Logits, before any cap, as a polynomial of the embeddings of one text.

    Attributes
    ----------
    heads: of each layer
    layers: the MLPs
    lambdas: [layers, 2], shares of the stream and of the embedding before each layer
    lamb: [layers], share of the first layer's values in each layer's
    unembed: [d_vocab, d_model]
    scales: what norms divide by, held, by hook; none for a model without norms
    """

    heads: tuple[tuple[ProductHead, ...], ...]
    layers: tuple[BilinearTensor, ...]
    lambdas: Float[Tensor, "layers 2"]
    lamb: Float[Tensor, " layers"]
    unembed: Float[Tensor, "d_vocab d_model"]
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def degree(self) -> int:
        """In the embeddings: ten to the number of layers."""
        return int(10 ** len(self.layers))

    def __repr__(self) -> str:
        held = f", {len(self.scales)} scales held" if self.scales else ""
        return (
            f"TensorPolynomial({len(self.layers)} layers of {len(self.heads[0])} heads, degree "
            f"{self.degree} in d_model={self.unembed.shape[1]}{held})"
        )

    def __call__(self, x0: Float[Tensor, "... pos d_model"]) -> Float[Tensor, "... pos d_vocab"]:
        """Logits from embeddings. Where scales are held, of as many positions as they are of."""
        return self._evaluate(
            checks.require_rows("x0", x0, self.unembed.shape[1], "d_model", self.unembed)
        )

    def by_degree(
        self, x0: Float[Tensor, "pos d_model"], *, max_bytes: int = checks.MAX_DENSE_BYTES
    ) -> Float[Tensor, "degrees pos d_vocab"]:
        """The logits split by degree in the embeddings, from 0 (the biases alone) to `degree`.

        From the values at ``w x0`` for the roots of unity w, by a Fourier transform: exact up to
        rounding, which is that of the largest of them. Raises MemoryError above `max_bytes`.
        """
        x0 = checks.require_rows("x0", x0, self.unembed.shape[1], "d_model", self.unembed)
        count = self.degree + 1
        checks.require_affordable(
            f"the logits of {count} degrees",
            2 * count * x0.shape[0] * max(len(self.unembed), 8 * x0.shape[1]),
            x0.dtype,
            max_bytes,
            "use fewer positions, or project the unembedding on the tokens that you mean",
        )
        angles = 2 * torch.pi * torch.arange(count, dtype=torch.float64) / count
        roots = torch.polar(torch.ones_like(angles), angles).to(x0.device)
        values = self._evaluate((roots[:, None, None] * x0).to(_complex(x0.dtype)))
        return torch.fft.fft(values, dim=0, norm="forward").real

    def _evaluate(self, x0: Tensor) -> Tensor:
        length = x0.shape[-2]
        causal = torch.ones(length, length, dtype=torch.bool, device=x0.device).tril()
        x = x0
        first_values: list[Tensor] = []
        for number, (heads, layer) in enumerate(zip(self.heads, self.layers, strict=True)):
            x = self.lambdas[number, 0] * x + self.lambdas[number, 1] * x0
            read = x / self._scale(f"blocks.{number}.ln1")
            values = [read @ head.value.T.to(x.dtype) for head in heads]
            first_values = first_values or values
            lamb = self.lamb[number]
            for h, head in enumerate(heads):
                pattern: Any = causal
                for query, key, mark in ((head.query, head.key, ""), (head.query2, head.key2, "2")):
                    sides = [
                        self._turned(
                            read @ rows.T.to(x.dtype),
                            head,
                            f"blocks.{number}.attn.{side}{mark}_norm",
                            h,
                        )
                        for rows, side in ((query, "q"), (key, "k"))
                    ]
                    pattern = pattern * (sides[0] @ sides[1].mT)
                mixed = (1 - lamb) * values[h] + lamb * first_values[h]
                x = x + pattern @ mixed @ head.out.T.to(x.dtype)
            read = x / self._scale(f"blocks.{number}.ln2")
            left, right, out = (t.T.to(x.dtype) for t in (layer.left, layer.right, layer.out))
            x = x + ((read @ left) * (read @ right)) @ out
            if layer.bias_out is not None:
                x = x + layer.bias_out
        return x / self._scale("ln_final") @ self.unembed.T.to(x.dtype)

    def _turned(self, rows: Tensor, head: ProductHead, norm: str, number: int) -> Tensor:
        scale = self._scale(norm)
        rows = rows / (scale if isinstance(scale, float) else scale[:, number])
        if head.cos is None or head.sin is None:
            return rows
        length = rows.shape[-2]
        return rotated(rows, head.cos[:length].to(rows.dtype), head.sin[:length].to(rows.dtype))

    def _scale(self, norm: str) -> Tensor | float:
        return self.scales.get(f"{norm}.hook_scale", 1.0)


def product_head(model: Any, layer: int, head: int) -> ProductHead:
    """A head of a tensor transformer, reading what ``ln1.hook_normalized`` holds.

    The norms of its queries and keys are left out: they divide each score by a positive number of the
    two tokens. Its values are its own layer's part, ``(1 - lamb) V``, of those that the pattern
    multiplies.

    Raises IndexError for a head that does not exist, TypeError for a model of another kind, ValueError
    for attention that is not a product of scores.
    """
    fields = _require_product(model, "the form of a head")
    for name, index, count in (("layer", layer, fields.n_layer), ("head", head, fields.n_head)):
        if not -count <= index < count:
            raise IndexError(f"{name} {index} does not exist: there are {count} (0 to {count - 1})")
    found = _head(model, layer % fields.n_layer, head % fields.n_head)
    share = 1 - float(model.blocks[layer].attn.lamb.detach()) if layer % fields.n_layer else 1.0
    return ProductHead(**{**vars(found), "value": found.value * share})


@torch.no_grad()
def tensor_polynomial(
    model: Any, tokens: Int[Tensor, " pos"] | Tensor | str | None = None
) -> TensorPolynomial:
    """A tensor transformer as a polynomial of its embeddings, ``hook_embed``, read from its weights.

    Parameters
    ----------
    model: TensorTransformer of product attention and bilinear (or squared) MLPs
    tokens: [pos] or [1, pos], or text
        For a model with norms: the text whose scales are held. It equals the model there, and nowhere
        else.

    Raises TypeError for a model of another kind; ValueError, naming it, for what is not a polynomial,
    and for a model with norms without tokens.
    """
    fields = _require_product(model, "a polynomial")
    if fields.not_polynomial:
        raise ValueError(f"this model is no polynomial: {'; '.join(fields.not_polynomial)}")
    scales: dict[str, Tensor] = {}
    if fields.norm:
        if tokens is None:
            raise ValueError(
                "a model with norms is a polynomial only while their scales are held: give the tokens "
                "of the text to hold them at, or train with norm=False"
            )
        refuse_attached(model)
        _, cache = model.run_with_cache(
            as_tokens(model, tokens), names_filter=lambda name: name.endswith("hook_scale")
        )
        scales = {name: value[0] for name, value in cache.items()}
    layers = range(fields.n_layer)
    return TensorPolynomial(
        heads=tuple(tuple(_head(model, n, h) for h in range(fields.n_head)) for n in layers),
        layers=tuple(BilinearTensor.from_model(model, n) for n in layers),
        lambdas=torch.stack([model.blocks[n].lambdas.detach() for n in layers]),
        lamb=torch.stack([model.blocks[n].attn.lamb.detach() for n in layers]),
        unembed=model.W_U.detach().T.clone(),
        scales=scales,
    )


def _require_product(model: Any, what: str) -> Any:
    fields = getattr(getattr(model, "cfg", None), "tensor", None)
    if fields is None:
        raise TypeError(f"{what} needs a TensorTransformer, got {type(model).__qualname__}")
    if fields.attention != "product":
        reason = next(iter(fields.not_polynomial))
        raise ValueError(f"{what} needs attention that is a product of scores: here {reason}")
    return fields


def _head(model: Any, layer: int, head: int) -> ProductHead:
    attn = model.blocks[layer].attn
    width = model.cfg.d_head
    query, key, query2, key2, value = (
        getattr(attn, name)[head].detach().T.clone()
        for name in ("W_Q", "W_K", "W_Q2", "W_K2", "W_V")
    )
    half = width // 2
    return ProductHead(
        query=query / width,
        key=key,
        query2=query2 / width,
        key2=key2,
        value=value,
        out=attn.W_O[head].detach().T.clone(),
        cos=attn.rotary_cos[:, :half].clone(),
        sin=-attn.rotary_sin[:, :half].clone(),
        space=f"blocks.{layer}.ln1.hook_normalized"
        if model.cfg.tensor.norm
        else f"blocks.{layer}.hook_resid_pre",
    )


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex64 if dtype == torch.float32 else torch.complex128
