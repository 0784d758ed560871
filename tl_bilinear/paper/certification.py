"""Certify an image model: the command `tl-bilinear certify`.

>>> certify(CertifyConfig(data="mnist"))        # proofs.html, summary.json, certificate.safetensors

Trains (or reads) the models of the study of proofs, writes its page, and for the last of them a
certificate of the whole test set: distances, certified accuracy, and answers from k eigenpairs. The
certificate is accepted by the checker before anything is written, and the checker, one file that needs
numpy only, lies beside it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.io import require_writable, whole_directory, write_json
from tl_bilinear.paper.config import CertifyConfig
from tl_bilinear.paper.gallery import Written, as_json
from tl_bilinear.paper.page import finite, render
from tl_bilinear.paper.proofs import (
    Proofs,
    ProofsSettings,
    classifier,
    page_of,
    pixel_classifier,
    proofs,
)
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, config_for, load_images
from tl_bilinear.recipes.images.model import PIXEL_SPACE
from tl_bilinear.tensor import (
    InputMoments,
    adversarial_distances,
    certificate_checker,
    margin_spectrum,
    moment_metric,
    verify_certificate,
    write_certificate,
)

PAGE, SUMMARY, CERTIFICATE, CHECKER = (
    "proofs.html",
    "summary.json",
    "certificate.safetensors",
    "certificate_checker.py",
)
KIND = "certified"


@dataclass(frozen=True, eq=False)
class Certified:
    """What was proved, and what the independent checker says of it.

    Attributes
    ----------
    proofs: the study's result
    claims: of the certificate, as the checker accepted them: "certified", pairs of a radius and how many
        test images are right within it; "proved", how many answers k eigenpairs prove
    images: how many test images; k: eigenpairs of each pair of classes
    checked: seconds that the check took
    """

    proofs: Proofs
    claims: dict[str, Any]
    images: int
    k: int
    checked: float

    def __str__(self) -> str:
        lines = [f"Certified accuracy of {self.images:,} test images, accepted by the checker:"]
        lines += [
            f"  radius {r:g}: {count / self.images:.4f}" for r, count in self.claims["certified"]
        ]
        share = self.claims["proved"] / self.images
        lines.append(f"Right for certain from {self.k} eigenpairs a pair of classes: {share:.4f}")
        return "\n".join(lines)


def certify(config: CertifyConfig = CertifyConfig(), *, progress: bool = True) -> Certified:
    """Train, prove, check and write; `config.out` is written whole or not at all.

    Raises ValueError where the checker refuses (the message says what), KeyboardInterrupt naming the
    folder of trained models.
    """
    require_writable(config.out, KIND)
    data = load_images(config.data)
    own = ProofsSettings()
    training = config_for(data, own.config, size=config.size, epochs=config.epochs)
    settings = ProofsSettings(training, config.noises, config.radii)
    runs = Runs(config.runs_folder, progress=progress)
    start = time.monotonic()
    try:
        result = proofs(data, settings, runs=runs, progress=progress)
        last = replace(training, noise=config.noises[-1])
        model = runs.train(data, [last])[0].model
        # Beside the folder, on the same disk; it moves in when the checker has accepted it.
        config.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.out.absolute().parent) as place:
            path = Path(place) / CERTIFICATE
            claims, checked = _certificate(path, model, data, config, progress)
            found = Certified(result, claims, len(data.test_labels), config.k, checked)
            written = Written(
                "proofs", settings, page_of(result), round(time.monotonic() - start, 1)
            )
            _write(found, written, data, path, config.out)
    except KeyboardInterrupt:
        message = f"interrupted; trained models are kept in {config.runs_folder}"
        raise KeyboardInterrupt(message) from None
    return found


def _certificate(
    path: Path, model: ImageClassifier, data: ImageData, config: CertifyConfig, progress: bool
) -> tuple[dict[str, Any], float]:
    """Write the certificate of a model's test set; what the checker accepts of it, and its seconds."""
    layer, embedding = classifier(model)
    tensor = pixel_classifier(model)
    found = adversarial_distances(tensor, data.test_images, progress=progress)
    moments = InputMoments.of(data.train_images, population="training images", space=PIXEL_SPACE)
    known = margin_spectrum(tensor, config.k, moment_metric(tensor, moments))
    labels = data.test_labels
    write_certificate(
        path, layer, data.test_images, labels, found, known, radii=config.radii, embedding=embedding
    )
    start = time.monotonic()
    with torch.no_grad():
        claims = verify_certificate(path, layer, data.test_images, labels, embedding=embedding)
    return claims, round(time.monotonic() - start, 1)


def _write(found: Certified, written: Written, data: ImageData, path: Path, out: Path) -> None:
    with whole_directory(out, KIND) as folder:
        page = render("gallery.html", data=data, studies=[written])
        (folder / PAGE).write_text(page, encoding="utf-8")
        shutil.copy(certificate_checker.__file__, folder / CHECKER)
        shutil.move(path, folder / CERTIFICATE)
        summary = {
            "data": data.name,
            "test_images": found.images,
            "settings": as_json(written.settings),
            "study": written.page.summary,
            "certificate": {**found.claims, "pairs": found.k, "checked in seconds": found.checked},
        }
        write_json(folder / SUMMARY, finite(summary))
