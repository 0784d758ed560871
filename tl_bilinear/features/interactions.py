"""A bilinear layer between two dictionaries, from weights alone.

For output features read along ``e_a`` and input features written along ``d_b``, the layer is the
third-order tensor (Pearce et al. 2025, section 3.1)

    ``B~[a,b,c] = sum_ijk e_a[i] B[i,j,k] d_b[j] d_c[k]``:

which pairs of input features make each output feature. It is never formed.

>>> features = FeatureInteractions(model, 4, sae_resid_mid, sae_mlp_out)
>>> features.top(1882, k=15).to_pandas()                         # strongest pairs of one output feature
>>> features.interaction(1882, basis="activations").eigh(2)      # its eigenvectors
>>> features.sweep(k=2).to_pandas()                              # a table of all output features

On text, `run` gives an object that holds the activations:

>>> run = features.run(tokens)
>>> run.attribute(1882, position=7).to_pandas()    # the feature's value at one token, exactly
>>> run.verify_pairs(1882).to_pandas()             # predicted and measured, by intervention

**Conventions.** A pair's `value` is the entry, its `coefficient` what stands before z_b z_c (twice the
entry for b != c). An input dictionary before the norm sees the layer up to the token's scale (see
`features.passage`): from weights, everything holds up to a positive factor for each token.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.chance import (
    PairChance,
    PairNull,
    SpectrumChance,
    pair_chance,
    spectrum_chance,
)
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.examples import Side
from tl_bilinear.features.feature_sweep import FeatureSweep, feature_sweep
from tl_bilinear.features.geometry import EigenGeometry, Submatrix, eigen_geometry
from tl_bilinear.features.module_names import placed
from tl_bilinear.features.pair_counts import (
    MAX_PAIRS,
    PairCounter,
    PairCounts,
    PairOrder,
    RankedPairs,
    ranked_pairs,
)
from tl_bilinear.features.pairs import FeaturePairs
from tl_bilinear.features.passage import (
    Passage,
    input_passages,
    output_hooks,
    residual_passage,
)
from tl_bilinear.features.run import FeatureRun, default_mask, run_model, tokenise
from tl_bilinear.features.statistics import InteractionStatistics, interaction_statistics
from tl_bilinear.features.streaming import stream, stream_moments
from tl_bilinear.features.unembedding import (
    PromotedTokens,
    most_promoted,
    promoted_tokens,
    unembedding_row,
)
from tl_bilinear.hooks import EigenComponents
from tl_bilinear.hooks.points import LayerTensor, require_layer_tensor
from tl_bilinear.results import Kind
from tl_bilinear.tensor import (
    BilinearTensor,
    Eigendecomposition,
    InteractionMatrix,
    approximation_note,
)

Along = Literal["encoder", "decoder"]
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
        ``hook_resid_mid``, or at the module of Hugging Face that writes there
        (`tl_bilinear.features.module_names`); a bare matrix is taken to be at ``mlp.hook_in``.
    sae_out: SAE, transcoder, Dictionary or matrix [n_out, d_model]
        Its features are the outputs. At ``blocks.L.hook_mlp_out`` or ``mlp.hook_out``, or at
        ``model.layers.L.mlp``.
    output: "encoder" or "decoder", optional
        Read output features along encoder directions, what makes a feature fire, or along decoder
        directions. By default the encoder's, where it reads the layer's output.
    layer_tensor: BilinearTensor or Approximation, optional
        The layer as a function of ``mlp.hook_in``, instead of reading it from the model: for a gated
        MLP that is not bilinear, ``approximate_llama(model, tokens)[layer]``. An attribution's
        `error` and a check's `difference` then say what the approximation leaves out.

    Attributes
    ----------
    layer_tensor: BilinearTensor, the layer as a function of ``mlp.hook_in``
    hook_tensor: BilinearTensor, the layer as a function of activations at the input dictionary's hook
        (over the token's norm scale, where the hook lies before the norm)
    feature_tensor: BilinearTensor, B~ itself
    inputs, outputs: Dictionary
    passage: what lies between the input dictionary's hook and the layer
    directions: [n_out, d_model], along which output features are read
    input_directions: [n_in, d_model], along which input features are written

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
        output: Along | None = None,
        layer_tensor: LayerTensor | None = None,
    ) -> None:
        self.model = model
        if layer_tensor is None:
            layer_tensor = BilinearTensor.from_model(model, layer)
        else:
            layer_tensor = require_layer_tensor(model, layer, layer_tensor, "layer_tensor")
        self.layer = range(len(model.blocks))[layer]
        self.inputs = placed(model, Dictionary.of(sae_in))
        self.outputs = placed(model, Dictionary.of(sae_out))
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
        self.output: Along = output
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
        self.hook_tensor = self.passage.fold(layer_tensor)
        self.directions: Float[Tensor, "n_out d"] = chosen.to(layer_tensor.out)
        self.input_directions: Float[Tensor, "n_in d"] = self.inputs.decoder.to(layer_tensor.left)

    def __repr__(self) -> str:
        scale = ", up to the token's norm scale" if self.passage.needs_scale else ""
        note = approximation_note(self.layer_tensor)
        kind = "" if note is None else f"{note}: "
        return (
            f"FeatureInteractions({kind}layer {self.layer}: {self.inputs.n} features at "
            f"{self.passage.hook}{scale} -> {self.outputs.n} features at {self.output_hook}, "
            f"read along the {self.output})"
        )

    def with_labels(
        self, *, input: Sequence[str] | None = None, output: Sequence[str] | None = None
    ) -> FeatureInteractions:
        """The same layer with names for its features, which every result then carries and shows.

        input: [n_in], output: [n_out] names; None leaves those there are. `FeatureRun.labelled` makes
        them from a text.
        """
        named = copy.copy(self)
        named.inputs = Dictionary.of(self.inputs, labels=input)
        named.outputs = Dictionary.of(self.outputs, labels=output)
        return named

    def run(
        self,
        text: str | Sequence[str] | Tensor,
        *,
        batch_size: int = 16,
        mask: Bool[Tensor, "batch pos"] | None = None,
        progress: bool = True,
    ) -> FeatureRun:
        """The model on a text: an object that holds the activations and answers what text can say.

        Parameters
        ----------
        text: str, strings, or token ids [batch, pos] or [pos]
            Text gets [BOS] in front as the dictionaries were trained.
        batch_size: int
            Sequences a forward. The run holds the activations of all of them in memory, 2 to 4 vectors
            [d] a token: 8 to 16 kB at d = 1024 in float32.
        mask: [batch, pos], optional
            Which tokens count. By default all but the first of a row, [BOS], the special tokens that
            the SAEs were not trained on (``metadata.exclude_special_tokens``) and padding.

        Raises ValueError where the model lacks a hook, where SAEs are attached to it (its activations
        are then no longer its own), and for a mask of another shape; TypeError for what is no text.
        """
        return run_model(self, text, mask=mask, batch_size=batch_size, progress=progress)

    def moments(
        self,
        text: str | Sequence[str] | Tensor,
        features: int | Sequence[int] | Tensor | None = None,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        batch_size: int = 16,
        checkpoint: str | Path | None = None,
        max_bytes: int = checks.MAX_DENSE_BYTES,
        progress: bool = True,
    ) -> Any:
        """The moments of what the layer reads on a text of any length, without holding activations.

        Parameters
        ----------
        text, mask: as in `run`
        features: optional
            An output feature: the tokens where it is active. Several: a list, one each.
        checkpoint: optional
            A file that keeps the sums about once a minute; a call that was stopped goes on from there.

        Returns InputMoments, or a list of them. Memory: d x d float64 numbers for each population.
        Raises ValueError for a checkpoint of other text, weights or features, and for a population
        without tokens; MemoryError beyond `max_bytes`.
        """
        given = None if features is None else self.numbers(features)
        tokens, lengths = tokenise(self.model, text, (self.inputs, self.outputs))
        counted = (
            default_mask(self, tokens, lengths)
            if mask is None
            else checks.require_mask(mask, tokens.shape)
        )
        found = stream_moments(
            self,
            tokens,
            counted,
            lengths,
            None if given is None else given.reshape(-1),
            batch_size=batch_size,
            checkpoint=checkpoint,
            max_bytes=max_bytes,
            progress=progress,
        )
        return found if given is not None and given.ndim else found[0]

    def count_pairs(
        self,
        text: str | Sequence[str] | Tensor,
        outputs: Sequence[int] | Tensor = (),
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        batch_size: int = 16,
        max_pairs: int = MAX_PAIRS,
        progress: bool = True,
    ) -> PairCounts:
        """How often input features are active together, on a text of any length.

        Parameters
        ----------
        text, mask: as in `run`
        outputs: output features, whose tokens are counted apart as well (`ranked_pairs`)
        max_pairs: distinct pairs held, ``8 (4 + 2 outputs)`` bytes each; beyond, the rarest are dropped,
            and `PairCounts.dropped` bounds what a count misses

        One batch's activations are held at a time. Counts of several texts: `PairCounts.merged`.
        """
        checks.require_positive("max_pairs", max_pairs)
        tokens, lengths = tokenise(self.model, text, (self.inputs, self.outputs))
        counted = (
            default_mask(self, tokens, lengths)
            if mask is None
            else checks.require_mask(mask, tokens.shape)
        )
        counter = PairCounter(self, self.numbers(outputs).reshape(-1), max_pairs)
        for _, part in stream(
            self, tokens, counted, lengths, batch_size=batch_size, progress=progress
        ):
            counter.add(part)
        return counter.result()

    def ranked_pairs(
        self, feature: int, counts: PairCounts, k: int = 10, *, by: PairOrder = "active"
    ) -> RankedPairs:
        """The k first pairs of an output feature by coefficient, on text, and where it is active.

        One table with all three ranks, sorted `by` "weights" (coefficient), "text" (mean contribution
        over all tokens) or "active" (over the tokens where the output feature is active).

        Raises ValueError for counts of another dictionary, or that were not made for this feature.
        """
        return ranked_pairs(self, feature, counts, k, by)

    # ------------------------------------------------------------------ the tensor

    @cached_property
    def feature_tensor(self) -> BilinearTensor:
        """B~ itself, factored: [n_out, n_in, n_in], never formed; biases included."""
        projected = self.hook_tensor.project(
            self.directions, space=f"features at {self.output_hook}"
        )
        return projected.fold(self.input_directions, space=self._input_space)

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
        index = slice(None) if features is None else self.numbers(features)
        if basis == "activations":
            return self.hook_tensor.interaction(self.directions[index])
        return self.feature_tensor.interaction()[index]

    # ------------------------------------------------------------------ pairs

    def top(
        self, features: int | Sequence[int] | Tensor, k: int = 15, *, kind: Kind = "all"
    ) -> FeaturePairs:
        """The k pairs of input features with the largest absolute coefficients, over all pairs, exact.

        Of each output feature given: [..., k]. Most pairs are never computed (see
        `InteractionMatrix.top`).
        """
        index = self.numbers(features)
        matrices = self.interaction(index, basis="activations")
        found = matrices.top(k, kind=kind, directions=self.input_directions)
        made = index[..., None].expand_as(found.first)
        return self._pairs(made, found.first, found.second, found.values)

    def top_overall(self, k: int = 100, *, kind: Kind = "all") -> FeaturePairs:
        """The k strongest (output feature, pair) of the whole tensor [k].

        Output features whose interaction matrix is too small to hold one of them are not searched.
        """
        matrices = self.interaction(basis="activations")
        made, found = matrices.top_of_batch(k, kind=kind, directions=self.input_directions)
        return self._pairs(made, found.first, found.second, found.values)

    def _pairs(self, made: Tensor, first: Tensor, second: Tensor, values: Tensor) -> FeaturePairs:
        return FeaturePairs(
            made,
            first,
            second,
            values,
            self._input_space,
            input_labels=self.inputs.labels_of(torch.cat([first, second])),
            output_labels=self.outputs.labels_of(made),
        )

    # ------------------------------------------------------------------ chance

    def pair_chance(
        self,
        feature: int,
        k: int = 20,
        *,
        null: PairNull = "neurons",
        rate: float = 0.05,
        draws: int = 25,
        seed: int = 0,
        max_bytes: int = checks.MAX_DENSE_BYTES,
    ) -> PairChance:
        """All pairs of an output feature beside a null: p-values, and discoveries at a stated rate.

        Parameters
        ----------
        k: how many of the least probable pairs are returned
        null: "neurons" or "dictionary", see `tl_bilinear.features.chance`
        rate: of false discoveries, over all n_in (n_in + 1) / 2 pairs
        draws: of the null; all pairs of each are pooled

        Raises MemoryError beyond `max_bytes` for the tables [n_in, n_in], ValueError for other nulls.
        """
        return pair_chance(
            self, feature, k, null, rate=rate, draws=draws, seed=seed, max_bytes=max_bytes
        )

    def spectrum_chance(
        self,
        features: Sequence[int] | Tensor | None = None,
        *,
        rate: float = 0.05,
        draws: int = 39,
        seed: int = 0,
        progress: bool = True,
    ) -> SpectrumChance:
        """How concentrated spectra of output features (all) are, beside hidden neurons paired at random.

        ``1 + draws`` eigendecompositions [d, d] a feature; p-values are at least 1 / (draws + 1).
        """
        index = self.numbers(range(self.outputs.n) if features is None else features).reshape(-1)
        return spectrum_chance(self, index, rate=rate, draws=draws, seed=seed, progress=progress)

    # ------------------------------------------------------------------ one output feature

    def submatrix(self, feature: int, k: int = 15) -> Submatrix:
        """Interactions among the input features of the k strongest pairs (Fig. 8A)."""
        feature = self.number(feature)
        pairs = self.top(feature, k)
        met = torch.cat([pairs.first, pairs.second[~pairs.is_self]])
        features, counts = met.unique(return_counts=True)
        features = features[counts.argsort(descending=True, stable=True)]
        Q = self.interaction(feature, basis="activations")
        return Submatrix(
            feature,
            features,
            Q.fold(self.input_directions[features]).dense(),
            [self.inputs.label(i) for i in features.tolist()],
            input_labels=self.inputs.labels_of(features),
            output_labels=self.outputs.labels_of([feature]),
        )

    def statistics(
        self, feature: int, *, bins: int = 101, sigmas: float = 6.0, progress: bool = True
    ) -> InteractionStatistics:
        """All interactions of an output feature as distributions, beside random ones (Fig. 24).

        Streams over all n_in^2 / 2 pairs; the reference spectrum is that of a random symmetric matrix
        of the same Frobenius norm, in the basis of activations.
        """
        feature = self.number(feature)
        Q = self.interaction(feature, basis="activations")
        found = interaction_statistics(
            feature, Q, self.input_directions, bins=bins, sigmas=sigmas, progress=progress
        )
        return replace(found, output_labels=self.outputs.labels_of([feature]))

    def geometry(
        self,
        feature: int,
        k: int = 15,
        *,
        eigen: Eigendecomposition | None = None,
        extra: Mapping[str, Tensor] | None = None,
        clusters: int = 3,
    ) -> EigenGeometry:
        """The features of the k strongest pairs, and other directions, along eigenvectors (Fig. 8B).

        Parameters
        ----------
        eigen: Eigendecomposition, optional
            In the basis of activations; by default the most positive and the most negative eigenpair.
        extra: name to direction [d] at the input dictionary's hook, optional
            Such as `unembedding(token)` differences or `FeatureRun.mean_input()`.
        clusters: int
            Into how many groups directions of similar cosines are put, at most.
        """
        among = self.submatrix(feature, k)
        if eigen is None:
            Q = self.interaction(feature, basis="activations")
            ends = [Q.eigh(1, which=end) for end in ("positive", "negative")]
        else:
            ends = [eigen]
        return eigen_geometry(
            among,
            self.input_directions[among.features],
            torch.cat([end.values for end in ends]),
            torch.cat([end.vectors for end in ends]),
            extra or {},
            clusters=clusters,
            hook=self.passage.hook,
        )

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
        index = self.numbers(features)
        directions = self.directions[index]
        eigen = self.layer_tensor.interaction(directions).eigh(k)
        if write == "minimal":
            return EigenComponents(eigen, self.layer)
        if write != "feature":
            raise ValueError(f"write must be 'minimal' or 'feature', got {write!r}")
        if self.outputs.hook not in (None, *output_hooks(self.model, self.layer)):
            raise ValueError(
                f"the output dictionary writes at {self.outputs.hook!r}, not at {self.output_hook!r}: "
                f"use write='minimal'"
            )
        rows = self.outputs.decoder[index].to(directions)
        return EigenComponents(eigen, self.layer, write=rows)

    # ------------------------------------------------------------------ all output features

    def sweep(
        self,
        features: Sequence[int] | Tensor | None = None,
        k: int = 2,
        *,
        screen: int | None = None,
        checkpoint: str | Path | None = None,
        max_bytes: int = checks.MAX_SOLVER_BYTES,
        progress: bool = True,
    ) -> FeatureSweep:
        """A table of output features (all): eigenvalues, strongest pair, AND-gate score, opposite.

        `screen`, `checkpoint` and `max_bytes` as in `BilinearTensor.spectrum`: a shortlist by norm, a
        folder to resume from, memory. Under torchrun the processes share the work.
        """
        found = feature_sweep(
            self.hook_tensor,
            self.directions,
            self.input_directions,
            self.outputs.decoder,
            self.numbers(range(self.outputs.n) if features is None else features).reshape(-1),
            k,
            screen=screen,
            checkpoint=checkpoint,
            max_bytes=max_bytes,
            progress=progress,
        )
        return replace(
            found,
            input_labels=self.inputs.labels_of(torch.cat([found.first, found.second])),
            output_labels=self.outputs.labels_of(torch.cat([found.features, found.opposites])),
        )

    # ------------------------------------------------------------------ tokens, by weights

    def unembedding(self, token: int) -> Float[Tensor, " d"]:
        """The direction that raises a token's logit, as it reaches the input dictionary's hook."""
        row = unembedding_row(self.model, token).to(self.input_directions)
        before = residual_passage(self.model, self.layer)
        return before.map(row) if self.passage.hook == before.layer_hook else row

    def promoted(self, feature: int, k: int = 10, *, side: Side = "output") -> PromotedTokens:
        """Tokens that a feature's decoder row promotes and suppresses through the unembedding (App. M).

        An input feature that lives after the norm is read as a direction of the residual stream
        (its norm weight taken off).
        """
        row = self.side(side).decoder[self.number(feature, side)]
        before = residual_passage(self.model, self.layer)
        weight = getattr(getattr(self.model.blocks[self.layer], "ln2", None), "w", None)
        if side == "input" and self.passage.hook == before.layer_hook and weight is not None:
            row = row / weight.detach().to(row)
        return promoted_tokens(self.model, row, k)

    def raised(self, k: int = 2) -> Int[Tensor, "n_out k"]:
        """The k tokens that each output feature's decoder row promotes most (`promoted` of all)."""
        return most_promoted(self.model, self.outputs.decoder, k)

    # ------------------------------------------------------------------ numbers of features

    @property
    def _input_space(self) -> str:
        return f"features at {self.passage.hook}"

    def side(self, side: Side) -> Dictionary:
        """The "input" or the "output" dictionary."""
        if side not in ("input", "output"):
            raise ValueError(f"side must be 'input' or 'output', got {side!r}")
        return self.inputs if side == "input" else self.outputs

    def number(self, feature: Any, side: Side = "output") -> int:
        """The number of one feature of a side, checked as `numbers` does."""
        index = self.numbers(feature, side)
        if index.numel() != 1 or isinstance(feature, (list, tuple)):
            raise TypeError(f"one {side} feature is read at a time, got {feature!r:.80}")
        return int(index)

    def numbers(self, features: Any, side: Side = "output") -> Int[Tensor, "..."]:
        """Numbers of features of a side, checked: TypeError and IndexError name the valid range."""
        n = self.side(side).n
        valid = f"{side} features are 0 to {n - 1}"
        try:
            index = torch.as_tensor(features, device=self.directions.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{valid}, numbers, got {features!r:.80}") from None
        if index.numel() and (index.dtype.is_floating_point or index.dtype == torch.bool):
            raise TypeError(f"{valid}, numbers, got {index.dtype}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < n):
            raise IndexError(f"{valid}, got {index.flatten().tolist()[:8]}")
        return index.long()


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
