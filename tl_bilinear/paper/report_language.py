"""The quickstart's sections on a language model: what ``templates/language.html`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tl_bilinear.features.labels import pieces
from tl_bilinear.paper.page import templates
from tl_bilinear.paper.quickstart_language import (
    LEAST_ACTIVE,
    NEAR,
    RANKS,
    READABLE,
    SHARED_TOKENS,
)
from tl_bilinear.plots import (
    correlation_figure,
    effects_figure,
    ranked_pairs_figure,
    statistics_figure,
)

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.paper.quickstart_language import LanguageQuickstart, OutputFeature

_EXAMPLES, _PAIRS = 5, 6
_BEFORE, _AFTER = 22, 7  # tokens shown around a peak

_TERMS = {  # of `Attribution.terms`, in words
    "features x features": "pairs of features",
    "b_dec x b_dec": "the input SAE's bias, squared",
    "error x error": "the input SAE's error, squared",
    "features x b_dec": "features × the input SAE's bias",
    "features x error": "features × the input SAE's error",
    "b_dec x error": "the input SAE's bias × its error",
    "- e . b_dec": "the output SAE's decoder bias",
    "b_enc": "the output SAE's encoder bias",
}


def language_sections(result: LanguageQuickstart) -> dict[str, Any]:
    """The model and its text, how features were chosen, and each feature: values for the template."""
    cfg = result.features.model.cfg
    return {
        "result": result,
        "facts": {
            "model": f"{cfg.n_layers} layers of width {cfg.d_model} with bilinear MLPs of {cfg.d_mlp} "
            f"hidden neurons, {cfg.n_heads} heads, a vocabulary of {cfg.d_vocab:,}",
            **result.facts,
            "analysed": f"on {sum(result.tokens):,} tokens of stories that the model wrote itself, in "
            f"{result.seconds:.0f} s",
        },
        "least_active": LEAST_ACTIVE,
        "readable": READABLE,
        "shared_tokens": SHARED_TOKENS,
        "near": f"{NEAR:g}",
        "made": int(
            (result.choice.enough(LEAST_ACTIVE) & (result.nearest.correlations < NEAR)).sum()
        ),
        "ranks": RANKS,
        "counted": int(result.choice.enough(LEAST_ACTIVE).sum()),
        "mean_active": result.choice.mean_active(LEAST_ACTIVE).tolist(),
        "above": result.choice.share_above(0.75, min_active=LEAST_ACTIVE),
        "correlation_figure": correlation_figure(result.choice, LEAST_ACTIVE),
        "features": [_feature(result, index) for index in range(len(result.found))],
    }


def _feature(result: LanguageQuickstart, index: int) -> dict[str, Any]:
    one, correlation = result.found[index], result.correlation
    words, shown = one.promoted.words, len(one.promoted.promoted)
    return {
        "one": one,
        "count": int(correlation.counts[index]),
        "raises": words[:shown],
        "lowers": words[shown:],
        "examples": _examples(result, one),
        **_pairs(result, one),
        "told": result.told(index),
        "effects_figure": effects_figure(one.effects, 10),
        "ranked_figure": ranked_pairs_figure(one.ranked, 10),
        "statistics_figure": statistics_figure(one.statistics),
        "correlations": [f"{float(correlation.active[index, rank - 1]):.3f}" for rank in RANKS],
        **_attribution(result, one),
        **_checks(result, one),
        "loss": one.loss.to_pandas().iloc[0],
        **_verdict(one),
    }


def _examples(result: LanguageQuickstart, one: OutputFeature) -> list[dict[str, Any]]:
    found = one.examples
    shown = (found.tokens, found.positions, found.strengths)
    rows = zip(*(values[:_EXAMPLES].tolist() for values in shown), strict=True)
    return [_context(result, *row) for row in rows]


def _context(
    result: LanguageQuickstart, tokens: Sequence[int], peak: int, strengths: Sequence[float]
) -> dict[str, Any]:
    """The tokens around one, within its story: words, strengths, the peak's place, and what is cut."""
    tokenizer = result.features.model.tokenizer
    start, stop = peak, peak + 1
    while start > max(0, peak - _BEFORE) and tokens[start - 1] != tokenizer.bos_token_id:
        start -= 1
    end = min(len(tokens), peak + _AFTER)
    while stop < end and tokens[stop - 1] != tokenizer.eos_token_id:
        stop += 1
    return {
        "words": pieces(tokenizer, tokens[start:stop]),
        "strengths": strengths[start:stop],
        "peak": peak - start,
        "begins": start == 0 or tokens[start - 1] == tokenizer.bos_token_id,
        "ends": tokens[stop - 1] == tokenizer.eos_token_id,
    }


def _pair(result: LanguageQuickstart, b: int, c: int) -> Markup:
    macros: Any = templates().get_template("macros.html").module
    return macros.pair([b, c], [result.labels[b], result.labels[c]])


def _pairs(result: LanguageQuickstart, one: OutputFeature) -> dict[str, Any]:
    table = one.ranked.to_pandas().head(_PAIRS).to_dict("records")
    improbable = one.chance.to_pandas().head(_PAIRS).to_dict("records")
    return {
        "ranked": [
            [
                _pair(result, row["first"], row["second"]),
                f"{row['coefficient']:+.3f}",
                f"{row['where_active']:+.3f}",
                f"{row['together']:,}",
                f"{row['together_active']:,}",
                f"{row['correlation']:+.2f}",
                f"{row['rank_weights']:,}",
                f"{row['rank_text']:,}",
            ]
            for row in table
        ],
        "improbable": [
            [
                _pair(result, row["first"], row["second"]),
                f"{row['coefficient']:+.3f}",
                f"{row['z']:+.1f}",
                "yes" if row["found"] else "no",
            ]
            for row in improbable
        ],
    }


def _attribution(result: LanguageQuickstart, one: OutputFeature) -> dict[str, Any]:
    found = one.attribution
    tokens = one.examples.tokens[0].tolist()
    only = [float(place == found.position) for place in range(len(tokens))]
    largest = found.to_pandas(_PAIRS)
    pairs = [
        [_pair(result, row["first"], row["second"]), f"{row['contribution']:+.4f}"]
        for row in largest.to_dict("records")
    ]
    m = len(found.features)
    if others := m * (m + 1) // 2 - len(pairs):
        rest = float(found.pairs.sum()) - largest["contribution"].sum()
        pairs.append([f"the other {others:,} pairs", f"{rest:+.4f}"])
    terms = [
        [_TERMS.get(name, name), f"{value:+.4f}"] for name, value in found.terms().items() if value
    ]
    bold = Markup("<b>{}</b>").format
    terms.append([bold("sum"), bold(f"{found.total:+.4f}")])
    terms.append([bold("the model's own"), bold(f"{found.measured:+.4f}")])
    return {
        "attributed": _context(result, tokens, found.position, only),
        "attributed_pairs": pairs,
        "attributed_terms": terms,
    }


def _checks(result: LanguageQuickstart, one: OutputFeature) -> dict[str, Any]:
    def rows(frame: pandas.DataFrame, names: list[Any], **formats: str) -> list[list[Any]]:
        return [
            [name, *(format(row[column], how) for column, how in formats.items())]
            for name, row in zip(names, frame.to_dict("records"), strict=True)
        ]

    both = {"predicted": "+.4f", "measured": "+.4f"}
    pairs, eigen, after = (
        each.to_pandas() for each in (one.pairs, one.eigenvectors, one.downstream)
    )
    return {
        "pair_checks": rows(
            pairs,
            [_pair(result, b, c) for b, c in zip(pairs["first"], pairs["second"], strict=True)],
            tokens=",",
            **both,
            control=".4f",
        ),
        "eigenvector_checks": rows(
            eigen,
            [f"eigenvector {number + 1}" for number in eigen["component"]],
            **both,
            error=".0e",
            control_error=".0e",
        ),
        "downstream": rows(
            after,
            [f"component {number + 1}" for number in after["component"]],
            effect="+.4f",
            low="+.4f",
            high="+.4f",
            control_effect="+.4f",
        ),
    }


def _verdict(one: OutputFeature) -> dict[str, Any]:
    """What the checks say: errors, and the components without which promoted tokens are less likely."""
    error = float(one.eigenvectors.error.max())
    control = float(one.eigenvectors.control_error.min())
    high = one.downstream.interval[:, 1].tolist()
    return {
        "error": error,
        "control": control,
        "agrees": error < control / 10,
        "lowering": [str(number) for number, value in enumerate(high, start=1) if value < 0],
    }
