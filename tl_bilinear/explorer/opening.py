"""Write a page of what there is, and open it."""

from __future__ import annotations

import html
import webbrowser
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.circuits import FeatureCircuit, FeatureGraph
from tl_bilinear.circuits.graph import layer_name
from tl_bilinear.demo import (
    demo_card,
    demo_layers,
    load_demo_model,
    load_demo_saes,
    load_demo_tokens,
)
from tl_bilinear.explorer import notebook
from tl_bilinear.explorer.config import ExploreConfig
from tl_bilinear.explorer.documents import Panel, write_folder, write_page
from tl_bilinear.explorer.graph_documents import graph_panel
from tl_bilinear.explorer.image_documents import image_panel
from tl_bilinear.explorer.language_documents import language_panel
from tl_bilinear.features import FeatureInteractions, FeatureRun
from tl_bilinear.features.examples import Side
from tl_bilinear.features.labels import pieces
from tl_bilinear.io import is_ours, mark, refuse_foreign
from tl_bilinear.paper.config import runs_beside
from tl_bilinear.paper.quickstart import KIND, Quickstart
from tl_bilinear.paper.regularisation import regularisers
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig, config_for, load_images
from tl_bilinear.tensor import Spectrum

# Of the graphs of the model that ships: features that they lead to, of how many tried; pairs of each
# feature; words in the name of one at a token.
GRAPH_TARGETS, GRAPH_TRIED, GRAPH_PAIRS, WORDS = 4, 64, 10, 10


@dataclass(frozen=True)
class PageView:
    """A page that was written. In a notebook it shows itself.

    With anywidget (the extra ``notebook``) it shows as a widget: `selected` is the feature that the page
    shows, and text of one's own and interventions are answered by the model. Without, as a plain frame.

    Attributes
    ----------
    path: the HTML file; height: of the frame in a notebook, in pixels
    run: what the model's answers come from; None for a page of panels
    """

    path: Path
    height: int = 800
    run: FeatureRun | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"PageView({self.path}, {self.path.stat().st_size / 1e6:.1f} MB)"

    def open(self) -> None:
        """Open the page in a browser."""
        webbrowser.open(self.path.resolve().as_uri())

    @cached_property
    def widget(self) -> Any:
        """The page as an ``anywidget.AnyWidget``; its trait `place` is the page's address.

        Raises ImportError without anywidget.
        """
        return notebook.page_widget(self.path, self.run, self.height)

    @property
    def selected(self) -> tuple[Side, int] | None:
        """The feature that the page shows in a notebook, ("output", 12); None for another place."""
        return notebook.selected(self.widget.place)

    def select(self, side: Side, feature: int) -> None:
        """Show a feature in the page in a notebook, of the panel that `explore` names "language"."""
        self.widget.place = f"#/language/{side}/{feature}"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if notebook.available():
            return self.widget._repr_mimebundle_(**options)
        return {"text/plain": repr(self), "text/html": self.frame()}

    def frame(self) -> str:
        """HTML of a frame that holds the page whole: a notebook may not show files from disk."""
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="explorer" '
            f'style="width: 100%; height: {self.height}px; border: 1px solid #d9dee5"></iframe>'
        )


def explore(
    what: FeatureRun | FeatureInteractions | FeatureGraph | Panel | list[Panel],
    out: str | Path = "explorer.html",
    *,
    text: Any = None,
    title: str | None = None,
    folder: bool = False,
    open: bool = True,
    progress: bool = True,
) -> PageView:
    """A page of a layer on a text, of a run between two dictionaries; of a graph; or of panels.

    Parameters
    ----------
    what: FeatureRun, FeatureInteractions, FeatureGraph, Panel or several panels
        Features of a run that have no labels get them from its text.
    out: the HTML file, or with `folder` the folder, to write; what an earlier call wrote is replaced
    text: with FeatureInteractions only: the text that examples come from, as `FeatureInteractions.run`
        takes it
    title: str, optional
        By default the layer.
    folder: bool
        Write parts beside the page, which loads them as they are asked for; for large dictionaries.
        Interrupted and called again, it goes on.
    open: bool
        Open the page in a browser.

    Raises ValueError for FeatureInteractions without a text, or a text with anything else; TypeError
    for what holds no layer, such as a Spectrum.
    """
    if isinstance(what, FeatureInteractions):
        if text is None:
            raise ValueError(
                "a page shows features on a text: explore(features, text=...) or explore(run)"
            )
        what = what.run(text, progress=progress)
    elif text is not None:
        raise ValueError("text= goes with FeatureInteractions; a run has its own")
    run = None
    if isinstance(what, FeatureRun):
        run = what.labelled(progress=progress)
        panels = [language_panel(run, title=title or f"Layer {run.features.layer}")]
    elif isinstance(what, FeatureGraph):
        panels = [graph_panel(what, title=title or "Pairs across layers")]
    elif isinstance(what, Panel):
        panels = [what]
    elif isinstance(what, list | tuple) and all(isinstance(each, Panel) for each in what):
        panels = list(what)
    else:
        raise TypeError(
            f"a page shows a FeatureRun, FeatureInteractions with text=, a FeatureGraph, or panels, "
            f"got {type(what).__name__}"
            + (
                ", which has eigenvalues but no layer: give the features that it is of"
                if isinstance(what, Spectrum)
                else ""
            )
        )
    write = write_folder if folder else write_page
    path = write(panels, out, title=title or "tl_bilinear", progress=progress)
    view = PageView(path, run=run)
    if open:
        view.open()
    return view


def demo_run(config: ExploreConfig = ExploreConfig(), *, progress: bool = True) -> FeatureRun:
    """The model that ships, on stories of its own, with labels.

    Raises ValueError for a layer or a point without SAEs.
    """
    layer = demo_layers()[-1] if config.layer is None else config.layer
    saes = load_demo_saes(layer)
    if config.point not in saes or config.point == "mlp_out":
        known = " and ".join(sorted(saes.keys() - {"mlp_out"}))
        raise ValueError(f"input features are at {known}, got {config.point!r}")
    features = FeatureInteractions(
        load_demo_model("cpu"), layer, saes[config.point], saes["mlp_out"]
    )
    rows = load_demo_tokens()[: config.rows]
    return features.run(rows, progress=progress).labelled(progress=progress)


def demo_facts(layer: int) -> dict[str, str]:
    """What the model card says of the model and of a layer's SAEs."""
    card: dict[str, Any] = demo_card()
    model = card["model"]
    found = {
        "model": f"{model['parameters']:,} parameters, {model['loss']:.3f} nats a token",
        "stories": "written by the model itself",
    }
    for each in card["saes"]["evaluation"]:
        if each["sae"].startswith(f"{layer}-"):
            found[f"SAE {each['sae']}"] = (
                f"{each['l0']:.0f} features active at once; misses {each['nmse']:.0%} of the variance"
            )
    return found


def demo_panel(run: FeatureRun) -> Panel:
    """The panel of the model that ships."""
    layer = run.features.layer
    return language_panel(
        run, title=f"Layer {layer} of the model that ships", facts=demo_facts(layer)
    )


def demo_panels(run: FeatureRun) -> list[Panel]:
    """The panel of a layer of the model that ships, and that of pairs across its layers."""
    layer = run.features.layer
    graphs = graph_panel(
        demo_graphs(run),
        title="Pairs across layers",
        facts=demo_facts(layer),
        links={layer_name(layer): ("language", "output")},
    )
    return [demo_panel(run), graphs]


def demo_graphs(run: FeatureRun) -> dict[str, FeatureGraph]:
    """Pairs of features across the layers of the model that ships which have SAEs, on a run's text.

    From the residual stream before the first of these layers to features of the last, at the token where
    each is strongest, and to all of them from weights. Of features with large interaction matrices they
    are those that the layers between make most of.
    """
    model, layers = run.features.model, demo_layers()
    runs = []
    for layer in layers:
        saes = load_demo_saes(layer)
        features = FeatureInteractions(model, layer, saes["resid_mid"], saes["mlp_out"])
        runs.append(features.run(run.tokens, progress=False).labelled(progress=False))
    source = {f"resid_mid {layers[0]}": runs[0].features.inputs}
    outputs = {each.features.layer: each.features.outputs for each in runs}
    circuit = FeatureCircuit(model, outputs, source)
    last, at = layers[-1], runs[-1]
    sizes = circuit.interactions[last].interaction(basis="activations").frobenius_norm()
    there: list[tuple[float, int, str, FeatureGraph]] = []
    tried = sizes.topk(GRAPH_TRIED).indices.tolist()
    z = at.activations(tried).masked_fill(~at.mask[..., None], 0)
    for i, feature in enumerate(tried):
        row, position = divmod(int(z[..., i].argmax()), z.shape[1])
        before = at.tokens[row, : position + 1]
        *words, word = pieces(model.tokenizer, before[-WORDS:].tolist())
        name = f"to {feature} at “…{''.join(words)} [{word.strip()}]”"
        graph = circuit.graph_at(before, k=GRAPH_PAIRS, targets={last: [feature]})
        there.append((_through(graph), feature, name, graph))
    there = sorted(there, key=lambda each: -each[0])[:GRAPH_TARGETS]
    targets = [feature for _, feature, *_ in there]
    weights = circuit.graph(GRAPH_PAIRS, {last: targets})
    return {f"from weights, to {', '.join(map(str, targets))}": weights} | {
        name: graph for *_, name, graph in there
    }


def _through(graph: FeatureGraph) -> float:
    """Of the contributions to the last dictionary, the share of pairs with a feature that is made."""
    last = graph.nodes[graph.pairs[:, 2], 0] == len(graph.dictionaries) - 1
    made = graph.pairs[:, 2].unique()
    through = torch.isin(graph.pairs[:, :2], made).any(1)
    sizes = graph.strengths.abs()
    return float(sizes[last & through].sum() / sizes[last].sum().clamp_min(1e-30))


def explore_demo(
    config: ExploreConfig = ExploreConfig(), *, progress: bool = True
) -> tuple[PageView, FeatureRun]:
    """Write the page of the model that ships; the run is what a server answers from."""
    _require_place(config)
    run = demo_run(config, progress=progress)
    view = explore(
        demo_panels(run), config.out, title="tl_bilinear: explorer", folder=config.folder,
        open=False, progress=progress,
    )  # fmt: skip
    return replace(view, run=run), run


def explore_images(config: ExploreConfig, *, progress: bool = True) -> PageView:
    """Write a page that switches between image models: `config.images` by `config.regularisers`.

    Models that `config.runs` holds are not trained again. Raises ValueError for a regulariser that
    appendix B's sweep does not have.
    """
    _require_place(config)
    known = regularisers(TrainingConfig())
    if unknown := [each for each in config.regularisers if each not in known]:
        raise ValueError(f"no regulariser {unknown[0]!r}; there are {', '.join(known)}")
    runs = Runs(runs_beside(config.out, config.runs), progress=progress)
    names = list(dict.fromkeys(config.regularisers))
    sets = [load_images(source) for source in dict.fromkeys(config.images)]
    panels: list[Panel] = []
    for number, data in enumerate(sets):
        alike = [each.name for each in sets].count(data.name) > 1
        label = f"{data.name} ({number + 1})" if alike else data.name
        settings = regularisers(config_for(data, size=config.size))
        trained = runs.train(data, [settings[name] for name in names])
        for name, result in zip(names, trained, strict=True):
            facts = image_facts(data, result.accuracy) | {"regulariser": name}
            panels.append(
                image_panel(
                    result.model, data, title="Image models", facts=facts,
                    name=f"image-{len(panels)}",
                    choice={"trained on": label, "regulariser": name},
                )
            )  # fmt: skip
    title = "tl_bilinear: image models"
    return explore(
        panels, config.out, title=title, folder=config.folder, open=False, progress=progress
    )


def image_facts(data: ImageData, accuracy: float) -> dict[str, str]:
    """What a page says of an image model."""
    return {
        "images": f"{data.name}; {len(data.train_labels):,} to train on",
        "accuracy": f"{accuracy:.3f} on {len(data.test_labels):,} other images",
    }


def _require_place(config: ExploreConfig) -> None:
    """Refuse, before anything takes long, a place where the page cannot be written."""
    if config.folder:
        refuse_foreign(config.out, "explorer")
    elif config.out.is_dir():
        raise IsADirectoryError(f"{config.out} is a folder: name an HTML file, or give --folder")
    elif not config.out.expanduser().resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of {config.out} does not exist")


def quickstart_page(result: Quickstart, out: str | Path, *, progress: bool = True) -> PageView:
    """The page that the quickstart ends in: its image model, and the language model that ships."""
    images, data = result.images, result.images.data
    facts = image_facts(data, images.training.accuracy)
    if images.controls is not None:
        facts["did it learn?"] = images.controls.verdict
    panels = [image_panel(images.training.model, data, title=f"Images: {data.name}", facts=facts)]
    if result.language is not None:
        panels += demo_panels(demo_run(progress=progress))
    view = explore(panels, out, title="tl_bilinear: quickstart", open=False, progress=progress)
    if is_ours(view.path.parent, KIND):
        mark(
            view.path.parent, KIND
        )  # or the next quickstart would take the page for somebody else's
    return view
