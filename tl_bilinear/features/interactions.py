"""A bilinear layer between two dictionaries.

For output features read along ``e_a`` and input features written along ``d_b``, the layer is the
third-order tensor (Pearce et al. 2025, section 3.1)

    ``B~[a,b,c] = sum_ijk e_a[i] B[i,j,k] d_b[j] d_c[k]``:

which pairs of input features make each output feature, from weights alone. It is never formed.

>>> features = FeatureInteractions(model, 4, sae_resid_mid, sae_mlp_out)
>>> features.top(1882, k=15).to_pandas()                    # strongest pairs of one output feature
>>> features.interaction(1882, basis="activations").eigh(2)      # its eigenvectors
>>> features.sweep(k=2).to_pandas()                         # a table of all output features
>>> features.attribute(tokens, 1882, position=7).to_pandas()     # its value at one token, exactly
>>> features.verify_pairs(tokens, 1882).to_pandas()         # predicted and measured, by intervention

**Conventions.** A pair's `value` is the entry, its `coefficient` what stands before z_b z_c (twice the
entry for b != c). An input dictionary before the norm sees the layer up to the token's scale (see
`features.passage`): from weights, everything holds up to a positive factor for each token.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.features import activity, attribution, running, verification, weights
from tl_bilinear.features.activity import (
    ActivationScatter,
    ActiveInteractions,
    Examples,
    LowRankCorrelation,
    PromotedTokens,
)
from tl_bilinear.features.attribution import Attribution
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.passage import Passage, input_passages, output_hooks
from tl_bilinear.features.results import (
    EigenGeometry,
    FeatureSweep,
    InteractionStatistics,
    Submatrix,
)
from tl_bilinear.features.running import Run
from tl_bilinear.features.verification import PairCheck
from tl_bilinear.tensor import (
    BilinearTensor,
    Eigendecomposition,
    InteractionMatrix,
    TopInteractions,
    _checks,
)
from tl_bilinear.tensor.interaction import Kind

if TYPE_CHECKING:
    from tl_bilinear.hooks import EigenComponents

Text: TypeAlias = Tensor | str | Sequence[str] | Run
"""Token ids [batch, pos], text, or a run of the model on some that serves several analyses."""
Side = Literal["encoder", "decoder"]
Basis = Literal["features", "activations"]


class FeatureInteractions:
    """Which pairs of input features make each output feature of a bilinear layer.

    Parameters
    ----------
    model: a bilinear HookedTransformer or TransformerBridge (or SAELens's of either)
    layer: int
        From 0; negative from the end.
    sae_in: SAE, transcoder, Dictionary or matrix [n_in, d_model]
        Its decoder rows are the input features. At ``blocks.L.mlp.hook_in``, ``ln2.hook_normalized`` or
        ``hook_resid_mid``; a bare matrix is taken to be at ``mlp.hook_in``.
    sae_out: SAE, transcoder, Dictionary or matrix [n_out, d_model]
        Its features are the outputs. At ``blocks.L.hook_mlp_out`` or ``mlp.hook_out``.
    output: "encoder" or "decoder", optional
        Read output features along encoder directions, what makes a feature fire, or along decoder
        directions. By default the encoder's, where it reads the layer's output.

    tensor: BilinearTensor, optional
        The layer as a function of ``mlp.hook_in``, instead of reading it from the model: for a gated
        MLP that is not bilinear, ``BilinearTensor.approximate(mlp, inputs).tensor``. An attribution's
        `error` and a check's `difference` then say what the approximation leaves out.

    Attributes
    ----------
    tensor: BilinearTensor, the layer as a function of activations at the input dictionary's hook (over
        the token's norm scale, where the hook lies before the norm)
    inputs, outputs: Dictionary
    passage: what lies between the input dictionary's hook and the layer
    directions: [n_out, d_model], along which output features are read

    Raises ValueError for a hook, layer or width that does not fit, naming both sides, and for a layer
    that is not bilinear.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        sae_in: Any,
        sae_out: Any,
        *,
        output: Side | None = None,
        tensor: BilinearTensor | None = None,
    ) -> None:
        self.model = model
        layer_tensor = BilinearTensor.from_model(model, layer) if tensor is None else tensor
        self.layer = range(len(model.blocks))[layer]
        self.inputs, self.outputs = Dictionary.of(sae_in), Dictionary.of(sae_out)
        passages = input_passages(model, self.layer)
        hook = _nearest(self.inputs.hook, self.layer, "sae_in", list(passages), "reads")
        self.passage: Passage = passages[hook]
        out_hooks = output_hooks(model, self.layer)
        reads = self.outputs.encoder_hook if self.outputs.encoder is not None else None
        if output is None:
            output = "encoder" if reads in out_hooks or self.outputs.hook is None else "decoder"
            if self.outputs.encoder is None:
                output = "decoder"
        if output not in ("encoder", "decoder"):
            raise ValueError(f"output must be 'encoder' or 'decoder', got {output!r}")
        if output == "encoder" and self.outputs.encoder is None:
            raise ValueError(f"output='encoder', but {self.outputs!r} has no encoder")
        self.output: Side = output
        where = self.outputs.encoder_hook if output == "encoder" else self.outputs.hook
        self.output_hook = _nearest(where, self.layer, "sae_out", out_hooks, "writes")
        chosen = self.outputs.encoder if output == "encoder" else self.outputs.decoder
        assert chosen is not None
        for name, width, expected in (
            ("sae_in", self.inputs.d, layer_tensor.d_in),
            ("sae_out", chosen.shape[1], layer_tensor.d_out),
        ):
            if width != expected:
                raise ValueError(
                    f"{name} has width {width}, but layer {self.layer} of the model has width {expected}"
                )
        self.layer_tensor = layer_tensor
        self.tensor = self.passage.fold(layer_tensor)
        self.directions: Float[Tensor, "n_out d"] = chosen.to(layer_tensor.out)
        self.input_directions: Float[Tensor, "n_in d"] = self.inputs.decoder.to(layer_tensor.left)

    def __repr__(self) -> str:
        scale = ", up to the token's norm scale" if self.passage.needs_scale else ""
        return (
            f"FeatureInteractions(layer {self.layer}: {self.inputs.n} features at "
            f"{self.passage.hook}{scale} -> {self.outputs.n} features at {self.output_hook}, "
            f"read along the {self.output})"
        )

    # ------------------------------------------------------------------ from weights

    @cached_property
    def feature_tensor(self) -> BilinearTensor:
        """B~ itself, factored: [n_out, n_in, n_in], never formed; biases included."""
        space = f"features at {self.passage.hook}"
        projected = self.tensor.project(self.directions, space=f"features at {self.output_hook}")
        return projected.fold(self.input_directions, space=space)

    def interaction(
        self, features: int | Sequence[int] | Tensor | None = None, basis: Basis = "features"
    ) -> InteractionMatrix:
        """Interaction matrices of output features (all), implicit.

        In the basis of the input features [..., n_in, n_in], or of the activations at the input
        dictionary's hook [..., d, d]: there eigenvectors are directions that x can be read along.

        Raises IndexError for a feature that does not exist.
        """
        if basis not in ("features", "activations"):
            raise ValueError(f"basis must be 'features' or 'activations', got {basis!r}")
        index = self._features(features)
        if basis == "activations":
            return self.tensor.interaction(self.directions[index])
        return self.feature_tensor.interaction()[index]

    def top(
        self, features: int | Sequence[int] | Tensor, k: int = 15, *, kind: Kind = "all"
    ) -> TopInteractions:
        """The k pairs of input features with the largest absolute coefficients, over all pairs, exact.

        Most pairs are never computed (see `InteractionMatrix.top`).
        """
        matrices = self.interaction(features, basis="activations")
        found = matrices.top(k, kind=kind, directions=self.input_directions)
        return TopInteractions(
            found.rows, found.columns, found.values, f"features at {self.passage.hook}"
        )

    def top_overall(self, k: int = 100, *, kind: Kind = "all") -> tuple[Tensor, TopInteractions]:
        """The k strongest (output feature, pair) of the whole tensor: (output features [k], pairs [k]).

        Output features whose interaction matrix is too small to hold one of them are not searched.
        """
        return weights.top_overall(self, k, kind)

    def submatrix(self, feature: int, k: int = 15) -> Submatrix:
        """Interactions among the input features of the k strongest pairs (Fig. 8A)."""
        return weights.submatrix(self, feature, k)

    def statistics(
        self, feature: int, *, bins: int = 101, sigmas: float = 6.0, progress: bool = False
    ) -> InteractionStatistics:
        """All interactions of an output feature as distributions, beside random ones (Fig. 24).

        Streams over all n_in^2 / 2 pairs; the reference spectrum is that of a random symmetric matrix
        of the same Frobenius norm, in the basis of activations.
        """
        return weights.statistics(self, feature, bins, sigmas, progress)

    def geometry(
        self,
        feature: int,
        k: int = 15,
        *,
        spectrum: Eigendecomposition | None = None,
        extra: Mapping[str, Tensor] | None = None,
        clusters: int = 3,
    ) -> EigenGeometry:
        """The features of the k strongest pairs, and other directions, along eigenvectors (Fig. 8B).

        Parameters
        ----------
        spectrum: Eigendecomposition, optional
            In the basis of activations; by default the most positive and the most negative pair.
        extra: name to direction [d] at the input dictionary's hook, optional
            Such as `unembedding(token)` differences or `mean_input(tokens)`.
        clusters: int
            Into how many groups directions of similar cosines are put, at most.
        """
        return weights.geometry(self, feature, k, spectrum, extra or {}, clusters)

    def unembedding(self, token: int) -> Float[Tensor, " d"]:
        """The direction that raises a token's logit, as it reaches the layer's input dictionary."""
        row = self.model.W_U[:, token].detach().to(self.input_directions)
        weight = getattr(getattr(self.model, "ln_final", None), "w", None)
        row = row if weight is None else row * weight.detach().to(row)
        before = list(input_passages(self.model, self.layer).values())[-1]
        if self.passage.hook == before.hook:
            return row
        if self.passage.hook == before.layer_hook:
            return before.map(row)
        centred = self.model.cfg.normalization_type in ("LN", "LNPre")
        return row - row.mean() if centred else row

    def sweep(
        self,
        features: Sequence[int] | Tensor | None = None,
        k: int = 2,
        *,
        screen: int | None = None,
        checkpoint: str | Path | None = None,
        max_bytes: int = _checks.MAX_SOLVER_BYTES,
        progress: bool = True,
    ) -> FeatureSweep:
        """A table of output features (all): eigenvalues, strongest pair, AND-gate score, opposite.

        `screen`, `checkpoint` and `max_bytes` as in `BilinearTensor.spectrum`: a shortlist by norm, a
        folder to go on from, memory. Under torchrun the processes share the work.
        """
        index = self._all_or(features)
        return weights.feature_sweep(self, index, k, screen, checkpoint, max_bytes, progress)

    # ------------------------------------------------------------------ on activations

    def tokens(self, text: Text) -> Int[Tensor, "batch pos"]:
        """Token ids [batch, pos] of text, with [BOS] in front as the dictionaries were trained.

        Token ids are taken as they are. Raises ValueError where the two dictionaries disagree.
        """
        if isinstance(text, Run):
            return text.tokens
        if isinstance(text, Tensor):
            if text.ndim not in (1, 2) or text.dtype.is_floating_point:
                raise ValueError(
                    f"tokens must be ids [batch, pos] or [pos], got {list(text.shape)} {text.dtype}"
                )
            return text if text.ndim == 2 else text[None]
        wanted = {d.prepend_bos for d in (self.inputs, self.outputs)} - {None}
        if len(wanted) > 1:
            raise ValueError(
                "one dictionary was trained with [BOS] in front and one without: give token ids"
            )
        given = {} if not wanted else {"prepend_bos": wanted.pop()}
        return self.model.to_tokens(text if isinstance(text, str) else list(text), **given)

    def run(self, text: Text, *, batch: int = 16) -> Run:
        """The model on some tokens: the activations around the layer, for any method that takes text.

        It holds three vectors a token, and some numbers. A run as `text` is given back. Raises
        ValueError for a run that was made at other hooks, and where SAEs are attached to the model: its
        activations are not its own then.
        """
        return running.run(self, text, batch)

    def outputs_of(
        self, output: Float[Tensor, "... d"], features: Tensor | None = None
    ) -> Float[Tensor, "... m"]:
        """What the layer's output is worth to output features (all): their pre-activations [..., m].

        With ``output="decoder"`` the products with the decoder's rows, without any constant.
        """
        if self.output == "encoder":
            return self.outputs.preactivation(output, features)
        chosen = slice(None) if features is None else features
        return output @ self.directions[chosen].to(output).T

    def attribute(self, text: Text, feature: int, position: int = -1) -> Attribution:
        """An output feature's pre-activation at one token as a sum over pairs of input features.

        Exact: the pairs, the named rest (b_dec, SAE error, biases) and the constants sum to what the
        model computes (`Attribution.error` says how nearly). Raises ValueError for several sequences.
        """
        return attribution.attribute(self, text, feature, position)

    def low_rank_correlation(
        self,
        text: Text,
        k: int = 10,
        features: Sequence[int] | Tensor | None = None,
        *,
        skip: int = 1,
        batch: int = 16,
        progress: bool = True,
    ) -> LowRankCorrelation:
        """How well 1 to k eigenvectors predict pre-activations, on all and on active tokens (Fig. 9).

        Eigenvectors are those of the layer at ``mlp.hook_in``, after the norm; the first `skip` tokens
        of a sequence are left out, as in the paper. About ``2 k m d`` flops a token for m features.
        """
        index = self._all_or(features)
        return activity.low_rank(self, text, index, k, skip, batch, progress)

    def scatter(
        self, text: Text, feature: int, k: int = 2, *, skip: int = 1,
        batch: int = 16,
    ) -> ActivationScatter:  # fmt: skip
        """A feature's pre-activation beside its approximation by k eigenvectors, token by token."""
        return activity.scatter(self, text, feature, k, skip, batch)

    def active_interactions(
        self,
        text: Text,
        feature: int,
        *,
        skip: int = 1,
        batch: int = 16,
        limit: int = 2000,
        progress: bool = False,
    ) -> ActiveInteractions:
        """The pairs that made an output feature on the tokens where it is active (section 3.1).

        At most `limit` such tokens are looked at.
        """
        return activity.active_interactions(self, text, feature, skip, batch, limit, progress)

    def examples(
        self,
        text: Text,
        feature: int,
        k: int = 10,
        *,
        side: Literal["input", "output"] = "output",
        skip: int = 1,
        batch: int = 16,
    ) -> Examples:
        """The sequences on which a feature is most active, with its strength on every token (App. M)."""
        return activity.examples(self, text, feature, k, side, skip, batch)

    def labels(
        self,
        text: Text,
        k: int = 20,
        *,
        side: Literal["input", "output"] = "input",
        skip: int = 1,
        batch: int = 16,
        progress: bool = False,
    ) -> list[str]:
        """A name for every feature of a side: the token that its k strongest activations are on.

        In one pass over the text. ``happy``; ``(not) happy`` where the same token stands before; else
        the three most common, ``happy | glad | proud``. A name says where a feature is active, not
        what it does. For tables and figures: ``Dictionary.of(sae, labels=features.labels(text))``.
        """
        return activity.labels(self, text, side, k, skip, batch, progress)

    def promoted(
        self, feature: int, k: int = 10, *, side: Literal["input", "output"] = "output"
    ) -> PromotedTokens:
        """Tokens that a feature's decoder row promotes and suppresses through the unembedding (App. M).

        An input feature that lives after the norm is read as a direction of the residual stream
        (its norm weight taken off).
        """
        chosen = activity.side_of(self, side)
        if not 0 <= feature < chosen.n:
            raise IndexError(f"{side} features are 0 to {chosen.n - 1}, got {feature}")
        row = chosen.decoder[feature]
        before = list(input_passages(self.model, self.layer).values())[-1]
        weight = getattr(getattr(self.model.blocks[self.layer], "ln2", None), "w", None)
        if side == "input" and self.passage.hook == before.layer_hook and weight is not None:
            row = row / weight.detach().to(row)
        return activity.promoted(self, row, k)

    def mean_input(self, text: Text, where: Tensor | None = None) -> Float[Tensor, " d"]:
        """Mean activation at the input dictionary's hook, over tokens, [batch, pos], or some of them."""
        found = self.run(text).activations
        chosen = found.flatten(0, 1) if where is None else found[where]
        if len(chosen) == 0:
            raise ValueError("no token was chosen")
        return chosen.mean(0)

    # ------------------------------------------------------------------ by intervention

    def verify_pairs(
        self,
        text: Text,
        feature: int,
        pairs: TopInteractions | ActiveInteractions | int = 10,
        *,
        skip: int = 0,
        limit: int = 64,
        seed: int = 0,
    ) -> PairCheck:
        """Check pairs of input features causally: effect predicted from weights against measured.

        Each pair's features are removed from the model's activations one at a time and together, on at
        most `limit` tokens where both are active, with the norm scale held (see `verification`). `pairs`
        may be a number: that many of the strongest cross-interactions. A feature with itself is left
        out. Random directions of the same length serve as the control.
        """
        if isinstance(pairs, int):
            pairs = self.top(feature, pairs, kind="cross")
        return verification.verify_pairs(self, text, feature, pairs, skip, limit, seed)

    def components(
        self,
        features: int | Sequence[int] | Tensor,
        k: int,
        *,
        write: Literal["minimal", "feature"] = "minimal",
    ) -> EigenComponents:
        """The k leading eigencomponents of output features, to record, ablate, steer or verify.

        They are those of the layer at ``mlp.hook_in``, in the running model (`tl_bilinear.hooks`).
        `write` says along which direction an edit is written: the smallest that changes the feature, or
        the feature's own decoder row.

        Raises ValueError for ``write="feature"`` where the decoder writes elsewhere, or where a row does
        not change its own feature.
        """
        from tl_bilinear.hooks import EigenComponents

        index = self._features(features)
        directions = self.directions[index]
        spectrum = self.layer_tensor.interaction(directions).eigh(k)
        if write == "minimal":
            return EigenComponents(spectrum, directions, self.layer)
        if write != "feature":
            raise ValueError(f"write must be 'minimal' or 'feature', got {write!r}")
        if self.outputs.hook not in (None, *output_hooks(self.model, self.layer)):
            raise ValueError(
                f"the output dictionary writes at {self.outputs.hook!r}, not at {self.output_hook!r}: "
                f"use write='minimal'"
            )
        rows = self.outputs.decoder[index].to(directions)
        return EigenComponents(spectrum, directions, self.layer, write=rows)

    @torch.no_grad()
    def output_without(
        self, run: Run, at: tuple[Tensor, Tensor], removed: Tensor | None
    ) -> Float[Tensor, "batch pos d"]:
        """The layer's output in a run with vectors [n, d] taken from the activations at n tokens.

        `at` is (sequences [n], positions [n]); the token's norm scale is held at that of `run`.
        """
        passage = self.passage

        def take(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[at] = value[at] - (0 if removed is None else removed.to(value))
            return value

        hooks: list[Any] = [(passage.hook, take)]
        if passage.scale_hook is not None:
            hooks.append((passage.scale_hook, lambda value, hook: run.scale.to(value)))
        held: list[Tensor] = []
        hooks.append((self.output_hook, lambda value, hook: held.append(value)))
        self.model.run_with_hooks(
            run.tokens,
            # Predicates find what names do not: a hook of SAELens's bridge that once held an SAE.
            fwd_hooks=[
                (partial(operator.eq, running.fires_as(self.model, name)), hook)
                for name, hook in hooks
            ],
            return_type=None,
            stop_at_layer=self.layer + 1,
        )
        return held[0]

    def _all_or(self, features: Sequence[int] | Tensor | None) -> Tensor:
        index = self._features(features)
        if isinstance(index, slice):
            return torch.arange(self.outputs.n, device=self.directions.device)
        return index.reshape(-1)

    def _features(self, features: int | Sequence[int] | Tensor | None) -> Any:
        if features is None:
            return slice(None)
        index = torch.as_tensor(features, device=self.directions.device)
        if index.dtype.is_floating_point or index.dtype == torch.bool:
            raise TypeError(f"features are numbers of output features, got {index.dtype}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.outputs.n):
            raise IndexError(
                f"output features are 0 to {self.outputs.n - 1}, got {index.flatten().tolist()[:8]}"
            )
        return index


def _nearest(hook: str | None, layer: int, name: str, valid: list[str], verb: str) -> str:
    """The hook itself where it is one of `valid`; a clear error otherwise."""
    if hook is None:
        return valid[0]
    if hook in valid:
        return hook
    close = difflib.get_close_matches(hook, valid, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"{name} is at {hook!r}, but layer {layer} {verb} at {', '.join(valid)}: give an SAE of one of "
        f"these hooks (the nearest is {close!r}), or another layer"
    )
