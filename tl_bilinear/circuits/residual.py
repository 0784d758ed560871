"""What tokens, heads and earlier layers write, as dictionaries of directions that a later layer reads.

The residual stream is a sum, so a direction written early arrives as it is at every later layer (the
direct path), and through a head as ``d W_V W_O``. As dictionaries both go into `FeatureInteractions`,
which then reads a layer's weights between them, with nothing run and no V x V matrix formed:

>>> tokens = embedding(model)
>>> previous = through_head(model, tokens, 0, 3)             # a token, seen through head 0.3
>>> sources = direct_path(model, 1, tokens, previous)        # both, as layer 1's MLP meets them
>>> features = FeatureInteractions(model, 1, sources, unembedding(model))
>>> features.top(42, k=20)             # which pairs of sources make token 42's logit
>>> source_pairs(model, 1, u, tokens, previous)      # a token with another that the head brings

**Up to positive factors.** Norms divide by a number of the token: an interaction of two sources holds
up to ``1 / s^2`` of the layer's norm, a source through a head up to the weight that the head gives it
and ``1 / s`` of the norm before it, a logit up to ``1 / s`` of the last norm. Signs hold, and so do
ratios within one source; ratios between sources hold at equal factors. `paths` has the exact numbers
of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.module_names import placed
from tl_bilinear.features.passage import norm_matrix, residual_passage, residual_tensor
from tl_bilinear.features.unembedding import token_names
from tl_bilinear.hooks.points import LayerTensor
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearTensor, TwoInputForm, approximation_note

if TYPE_CHECKING:
    import pandas

EMBED = "hook_embed"
_BEFORE_ATTENTION = ("hook_resid_pre",)
_BEFORE_MLP = (*_BEFORE_ATTENTION, "hook_attn_out", "hook_resid_mid")
_AFTER_MLP = ("mlp.hook_out", "hook_mlp_out", "hook_resid_post")
_STREAM = re.compile(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, _BEFORE_MLP + _AFTER_MLP))})")


def embedding(model: Any) -> Dictionary:
    """Every token's embedding, ``W_E`` [d_vocab, d_model], at ``hook_embed``.

    Raises ValueError for a model that normalises its embeddings (`post_embedding_ln`).
    """
    require_plain_stream(model)
    if getattr(model.cfg, "post_embedding_ln", False):
        raise ValueError(
            "this model normalises its embeddings (post_embedding_ln=True), so that a row of W_E is not "
            "what a token writes: give Dictionary(rows, hook='hook_embed') with the rows you mean"
        )
    rows = model.W_E.detach()
    return Dictionary(rows, hook=EMBED, labels=token_names(model, len(rows)))


def positions(model: Any) -> Dictionary:
    """Every learned position's embedding, ``W_pos`` [n_ctx, d_model].

    Raises ValueError for a model without (rotary, say).
    """
    kind = model.cfg.positional_embedding_type
    if kind != "standard":
        raise ValueError(
            f"only learned positions are written into the residual stream; this model's are {kind!r}"
        )
    rows = model.W_pos.detach()
    labels = [f"position {i}" for i in range(len(rows))]
    return Dictionary(rows, hook="hook_pos_embed", labels=labels)


def through_head(model: Any, source: Any, layer: int, head: int) -> Dictionary:
    """Directions through a head's OV circuit: ``d C w W_V W_O`` [n, d_model], at ``hook_attn_out``.

    C and w are the centring and weight of the norm before attention (its bias, and b_V, do not depend
    on the source). `source` may have gone through an earlier head already (virtual heads).

    Raises IndexError for a head that does not exist, ValueError for a source that the head cannot see.
    """
    require_plain_stream(model)
    layer = _existing(layer, model.cfg.n_layers, "layer")
    head = _existing(head, model.cfg.n_heads, "head")
    block = model.blocks[layer]
    found = _upstream(source, layer, _BEFORE_ATTENTION, f"head {layer}.{head}", model)
    W_V, W_O = block.attn.W_V[head].detach(), block.attn.W_O[head].detach()
    matrix = norm_matrix(model.cfg, getattr(block, "ln1", None), W_V)
    rows = found.decoder.to(W_V)
    rows = (rows if matrix is None else rows @ matrix) @ W_V @ W_O
    labels = found.labels or [str(i) for i in range(found.n)]
    name = f"through {layer}.{head}"
    return Dictionary(
        rows, hook=f"blocks.{layer}.hook_attn_out", labels=[f"{label} {name}" for label in labels]
    )


def direct_path(model: Any, layer: int, *sources: Any) -> Dictionary:
    """Directions written upstream as they arrive, unchanged, before a layer's MLP: [sum of n, d_model].

    Sources are dictionaries (or SAEs) of what is written into the residual stream before that MLP;
    several are put one after another. What `FeatureInteractions` takes as `sae_in`; it handles the
    norm's weight, and says that interactions hold up to its scale.

    Raises ValueError, naming it, for a source that is not in the residual stream or comes after the
    layer.
    """
    if not sources:
        raise ValueError("direct_path needs at least one source: a dictionary, an SAE or a matrix")
    require_plain_stream(model)
    layer = _existing(layer, model.cfg.n_layers, "layer")
    found = [_upstream(s, layer, _seen(model), f"the MLP of layer {layer}", model) for s in sources]
    labels = None
    if any(each.labels is not None for each in found):
        labels = [
            label for each in found for label in (each.labels or [str(i) for i in range(each.n)])
        ]
    rows = torch.cat([each.decoder.to(model.W_E) for each in found])
    return Dictionary(rows, hook=residual_passage(model, layer).hook, labels=labels)


def require_plain_stream(model: Any) -> None:
    """Raise ValueError for a model whose stream is more than the sum of what was written before."""
    if getattr(model.cfg, "tensor", None) is not None:
        raise ValueError(
            "a tensor transformer mixes the embedding into the stream before every layer, and the first "
            "layer's values into every head: what was written upstream does not arrive as it is. "
            "tensor_polynomial evaluates the whole"
        )


def _existing(index: int, count: int, what: str) -> int:
    if not -count <= checks.require_int(what, index) < count:
        raise IndexError(f"{what} {index} does not exist: there are {count} (0 to {count - 1})")
    return index % count


def reaches(model: Any, source: Dictionary, layer: int) -> bool:
    """Whether the MLP of a layer sees what a dictionary writes into the residual stream.

    Raises ValueError for one that does not write into it.
    """
    return _is_before(source, layer, _seen(model))


def writes_before_attention(source: Dictionary, layer: int) -> bool:
    """Whether attention of a layer sees what a dictionary writes into the residual stream.

    Raises ValueError for one that does not write into it.
    """
    return _is_before(source, layer, _BEFORE_ATTENTION)


def _seen(model: Any) -> Sequence[str]:
    """Hooks of a layer that its MLP comes after."""
    return _BEFORE_ATTENTION if model.cfg.parallel_attn_mlp else _BEFORE_MLP


def _is_before(source: Dictionary, layer: int, same_layer: Sequence[str]) -> bool:
    if source.hook in (None, EMBED, "hook_pos_embed"):
        return True
    place = _STREAM.fullmatch(source.hook)
    if place is None:
        raise ValueError(
            f"{source!r} does not write into the residual stream: a source lies at hook_embed or at a "
            f"block's hook_resid_pre, hook_attn_out, hook_resid_mid, hook_mlp_out or hook_resid_post"
        )
    written = int(place[1])
    return written < layer or (written == layer and place[2] in same_layer)


def _upstream(
    source: Any, layer: int, same_layer: Sequence[str], reader: str, model: Any
) -> Dictionary:
    """`source` as a dictionary, if what it writes is in the residual stream that `reader` sees."""
    found = placed(model, Dictionary.of(source))
    if found.d != model.cfg.d_model:
        raise ValueError(f"{found!r} has width {found.d}, the residual stream {model.cfg.d_model}")
    if not _is_before(found, layer, same_layer):
        raise ValueError(f"{found.hook} is not upstream of {reader}, which cannot see {found!r}")
    return found


# ---------------------------------------------------------------------- pairs of two sources


@dataclass(frozen=True, eq=False)
class SourcePairs(Result):
    """The strongest pairs of a direction of one source with a direction of another.

    Attributes
    ----------
    layer: whose MLP reads both
    first, second: [k], numbers in the first and the second source, by falling absolute coefficient
    coefficients: [k], ``2 d_first^T Q d_second``, what stands before the product of their activations
    label_first, label_second: [k] names
    approximation: what the layer stands for and how well, where it is an approximation
    """

    layer: int
    first: Int[Tensor, " k"]
    second: Int[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    label_first: list[str]
    label_second: list[str]
    approximation: str | None = None

    def top(self, k: int) -> SourcePairs:
        """The first k of them."""
        checks.require_count("k", k, len(self.first), "the pairs held")
        return replace(self, **{name: getattr(self, name)[:k] for name in _PAIR_COLUMNS})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: first, second, their labels, coefficient."""
        import pandas as pd

        return pd.DataFrame(
            {
                "first": self.first.tolist(),
                "second": self.second.tolist(),
                "label_first": self.label_first,
                "label_second": self.label_second,
                "coefficient": self.coefficients.tolist(),
            }
        )


_PAIR_COLUMNS = ("first", "second", "coefficients", "label_first", "label_second")


def source_pairs(
    model: Any,
    layer: int,
    direction: Float[Tensor, " d_model"],
    first: Any,
    second: Any,
    k: int = 20,
    *,
    layer_tensor: LayerTensor | None = None,
) -> SourcePairs:
    """The strongest pairs across two sources for a direction of a layer's output, from weights alone.

    A position holds one token, so that two embeddings never meet there; a token and another one that a
    head brings do: ``source_pairs(model, 0, u, embedding(model), through_head(model, tokens, 0, h))``
    is the table of token pairs that head h makes. (Of one dictionary with itself, features of an SAE
    say, `FeatureInteractions.top`.) The n x m table is never held (`PairMatrix.top`).

    Up to positive factors (see the module). `layer_tensor` stands for the layer where it is not read
    from the model, as in `virtual_weights`. Errors as `direct_path`.
    """
    one, other = (direct_path(model, layer, each) for each in (first, second))
    tensor, direction, note = _reading(model, layer, direction, layer_tensor)
    # Of the layer polarised: what stands before z_first z_second is twice its entry.
    form = 2 * TwoInputForm.of(tensor)
    sides = [each.decoder.to(tensor.left) for each in (one, other)]
    found = form.matrix(direction).top(k, left=sides[0], right=sides[1])
    return SourcePairs(
        layer=range(len(model.blocks))[layer],
        first=found.first,
        second=found.second,
        coefficients=found.coefficients,
        label_first=[one.label(i) for i in found.first.tolist()],
        label_second=[other.label(i) for i in found.second.tolist()],
        approximation=note,
    )


def _reading(
    model: Any, layer: int, direction: Tensor, layer_tensor: LayerTensor | None
) -> tuple[BilinearTensor, Tensor, str | None]:
    """A layer as it reads the residual stream before its MLP, and a direction of its output.

    With what it is an approximation of, if it is one.
    """
    tensor = residual_tensor(model, layer, layer_tensor)
    direction = checks.require_vector("direction", direction, tensor.d_out, "d_model", tensor.out)
    return tensor, direction, approximation_note(tensor)


# ---------------------------------------------------------------------- virtual weights


@dataclass(frozen=True, eq=False)
class VirtualWeights(Result):
    """How directions written upstream are read by the eigenvectors of a later layer.

    For a residual stream ``sum_b z_b d_b``, up to the linear part of biases,
    ``u . f(x) = sum_i values_i (sum_b z_b weights[b,i])^2 / s^2``.

    Attributes
    ----------
    layer: the later layer
    values: [k], eigenvalues of u's interaction matrix before the norm, by falling absolute value
    weights: [n, k], ``d_b . v_i``
    residual: how much of the matrix the k pairs leave out, in spectral norm (a bound)
    labels: names of the n directions
    approximation: what the layer stands for and how well, where it is an approximation
    """

    layer: int
    values: Float[Tensor, " k"]
    weights: Float[Tensor, "n k"]
    residual: float
    labels: list[str]
    approximation: str | None = None

    def strongest(self, k: int, eigenvector: int = 0) -> pandas.DataFrame:
        """The k directions that an eigenvector reads most: index, label, weight, contribution.

        `contribution` is ``value * weight^2``, what the direction alone makes at unit activation.
        """
        import pandas as pd

        checks.require_count("k", k, len(self.weights), "the directions")
        column = self.weights[:, eigenvector]
        chosen = column.abs().topk(k).indices
        return pd.DataFrame(
            {
                "index": chosen.tolist(),
                "label": [self.labels[i] for i in chosen.tolist()],
                "weight": column[chosen].tolist(),
                "contribution": (self.values[eigenvector] * column[chosen].square()).tolist(),
            }
        )

    def to_pandas(self) -> pandas.DataFrame:
        """All weights: one row a direction, one column an eigenvector, headed by its eigenvalue."""
        import pandas as pd

        columns = [f"{i}: {value:+.4g}" for i, value in enumerate(self.values.tolist())]
        return pd.DataFrame(self.weights.cpu().numpy(), index=self.labels, columns=columns)


def virtual_weights(
    model: Any,
    source: Any,
    layer: int,
    direction: Float[Tensor, " d_model"],
    k: int = 5,
    *,
    layer_tensor: LayerTensor | None = None,
) -> VirtualWeights:
    """An earlier layer's output directions (or any source) against a later layer's eigenvectors.

    Parameters
    ----------
    source: dictionary, SAE or matrix [n, d_model], upstream of the layer's MLP (`direct_path`)
    layer, direction: whose interaction matrix; direction [d_model] is read from the layer's output
    k: int
        Eigenpairs.
    layer_tensor: BilinearTensor or Approximation, optional
        The layer as a function of ``mlp.hook_in``, instead of reading it from the model.

    From weights alone, along the direct path, up to the norm's scale. Errors as `direct_path`.
    """
    inputs = direct_path(model, layer, source)
    tensor, direction, note = _reading(model, layer, direction, layer_tensor)
    eigen = tensor.interaction(direction).eigh(k)
    return VirtualWeights(
        layer=range(len(model.blocks))[layer],
        values=eigen.values,
        weights=inputs.decoder.to(eigen.vectors) @ eigen.vectors.T,
        residual=float(eigen.bound),
        labels=[inputs.label(i) for i in range(inputs.n)],
        approximation=note,
    )
