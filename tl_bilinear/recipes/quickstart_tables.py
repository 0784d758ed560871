"""What the quickstart found, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tl_bilinear.recipes.images.quickstart import ImageQuickstart
    from tl_bilinear.recipes.language.quickstart import LanguageQuickstart
    from tl_bilinear.recipes.quickstart import Quickstart


def quickstart_text(result: Quickstart) -> str:
    """The tables of both parts, or of the images alone."""
    parts = [_images(result.images)]
    if result.language is not None:
        parts.append(_language(result.language))
    return "\n\n".join(parts)


def _images(result: ImageQuickstart) -> str:
    import pandas as pd

    spectrum = result.spectra.pixel
    accuracy = {str(k): value for k, value in result.truncation.items()}
    accuracy["whole model"] = result.training.accuracy
    classes = [
        {
            "class": name,
            "three largest eigenvalues": "  ".join(
                f"{value:+.3f}" for value in values.sort(descending=True).values[:3].tolist()
            ),
            "most negative": f"{float(values.min()):+.3f}",
            "effective rank": f"{float(rank):.1f}",
        }
        for name, values, rank in zip(
            result.data.classes, spectrum.values, spectrum.effective_rank(), strict=True
        )
    ]
    return "\n\n".join(
        [
            f"{result.data.name}: accuracy on {len(result.data.test_labels):,} images",
            pd.Series(accuracy, name="accuracy")
            .rename_axis("eigenvectors a class")
            .reset_index()
            .to_string(index=False, float_format="{:.3f}".format),
            "Interaction matrices of the classes, in pixel space",
            pd.DataFrame(classes).to_string(index=False),
            f"Largest difference between model and tensor: {result.difference:.1e}   "
            f"({result.seconds:.0f} s of training and analysis)",
        ]
    )


def _language(result: LanguageQuickstart) -> str:
    import pandas as pd

    features = result.features
    rows = []
    for one, correlation in zip(result.found, result.correlation.active, strict=True):
        b, c = int(one.active.rows[0]), int(one.active.columns[0])
        pair = [result.labels[b]] if b == c else [result.labels[b], result.labels[c]]
        rows.append(
            {
                "feature": one.feature,
                "active on": one.name,
                "promotes": " ".join(one.promoted.words[:3]),
                "2 eigenvectors": f"r = {float(correlation[1]):.3f}",
                "strongest pair there": " x ".join(pair),
            }
        )
    sums = max(one.attribution.error for one in result.found)
    checked = max(float(one.eigenvectors.error.max()) for one in result.found)
    control = min(float(one.eigenvectors.control_error.min()) for one in result.found)
    return "\n\n".join(
        [
            f"A language model: {len(result.found)} of {features.outputs.n} features of layer "
            f"{features.layer}'s output",
            pd.DataFrame(rows).to_string(index=False),
            f"Attributions sum to within {sums:.0e}; interventions agree with the weights to "
            f"{checked:.0e} (random directions miss by {control:.0e})   ({result.seconds:.0f} s)",
        ]
    )
