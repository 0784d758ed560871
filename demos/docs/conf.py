"""The documentation site: `sphinx-build -W demos/docs site`, with the extra "docs" installed.

It executes the notebooks and the gallery, minutes on two cores, and keeps what they give in
demos/docs/.executed: a page is executed again when its code has changed. The explorer's page is written
once, to demos/docs/.explorer.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import plotly
from docutils import nodes
from latex2mathml.converter import convert

import tl_bilinear

HERE = Path(__file__).parent

project = "tl_bilinear"
author = "The tl_bilinear authors"
copyright = "2026, the tl_bilinear authors"
version = release = tl_bilinear.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md", ".executed"]
html_extra_path = [".explorer"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / ".executed")
nb_execution_timeout = 300  # seconds a cell
nb_execution_raise_on_error = True
nb_merge_streams = True
# A progress bar as its text: as a widget it would be drawn by scripts from the network.
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",  # matrices are small: more threads wait for each other
    "PLOTLY_RENDERER": "notebook_connected",  # figures without plotly.js: `local_plotly` adds it
}
# A page's `output` blocks are words; a notebook may lack the name of its lexer.
# Types in docstrings are sentences ("int", "[batch, pos]"), no names to link.
suppress_warnings = ["myst-nb.lexer", "ref.python"]

html_theme = "furo"
html_math_renderer = "mathml"  # what `setup` registers: MathJax would come from the network
html_title = f"tl_bilinear {version}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = [
    "site.css",
    str(Path(plotly.__file__).parent / "package_data" / "plotly.min.js"),
]
html_css_files = ["site.css"]

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay short: docstrings give shapes and types
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # shapes stand in the text

EXPLORER = HERE / ".explorer" / "explore.html"
EXPLORER.parent.mkdir(exist_ok=True)

# The notebooks lie beside this folder, and Sphinx reads only what is in it.
NOTEBOOKS = HERE / "notebooks"
NOTEBOOKS.mkdir(exist_ok=True)
for notebook in sorted(HERE.parent.glob("*.ipynb")):
    shutil.copyfile(notebook, NOTEBOOKS / notebook.name)

_CODE = re.compile(r"(``.*?``|`[^`]*`|\*\*[^*]+\*\*)")
_FIELD = re.compile(r"(\w[\w, ]*): (.+)")


def escape(line: str) -> str:
    """A docstring's line, with what reStructuredText would read as markup escaped."""
    parts = _CODE.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", parts[i]))
    return "".join(parts)


def fields(lines: list[str]) -> list[str]:
    """The sections "Parameters" and "Attributes" as Napoleon reads them.

    The docstrings write ``name: what it is`` where numpydoc has a type and a line of text, and end a
    section with one empty line where numpydoc takes two.
    """
    out: list[str] = []
    section = False
    for i, line in enumerate(lines):
        after = lines[i + 1] if i + 1 < len(lines) else ""
        if line.startswith("---"):
            section = out[-1] in ("Parameters", "Attributes")
        field = _FIELD.fullmatch(line) if section else None
        if field:
            type_alone = len(field[2]) < 60 and re.match(r" +[A-Z]", after)
            names = field[1].replace(
                ", ", ","
            )  # Sphinx takes what stands before a space for a type
            out += [names, f"    {field[2]}{'.' if type_alone else ''}"]
        elif section and not line and after[:1].strip() and not after.startswith("---"):
            out += ["", ""]
            section = False
        else:
            out.append(line)
    return out


def prepare_docstring(app, what, name, obj, options, lines) -> None:
    """Escape prose, and leave doctests and indented examples as they are."""
    literal = False
    for i, line in enumerate(lines):
        if line.strip() and not line.startswith(" "):
            literal = False
        if not literal and not line.lstrip().startswith((">>>", "...")):
            lines[i] = escape(line)
        if line.rstrip().endswith("::"):
            literal = True
    if what in ("attribute", "property"):  # Napoleon takes what stands before a colon for a type
        lines[0] = lines[0].replace(": ", ", ", 1)
    lines[:] = fields(lines)


# What plotly writes around each figure to load MathJax and itself from elsewhere.
_LOADED = re.compile(
    r"<script[^>]*(?:cdnjs\.cloudflare\.com|cdn\.plot\.ly)[^>]*></script>"
    r'|<script type="module">\s*import "https://cdn\.plot\.ly[^<]*</script>'
)


def local_plotly(app, pagename, templatename, context, doctree) -> None:
    """Let a page's figures use the site's own plotly.js, so that a site on a disk shows them."""
    body = context.get("body", "")
    if "plotly-graph-div" in body:
        context["meta"] = {**(context.get("meta") or {}), "hide-toc": True}  # room for figures
        source = context["pathto"]("_static/plotly.min.js", resource=True)
        context["body"] = f'<script src="{source}"></script>' + _LOADED.sub("", body)


def inline_mathml(writer, node) -> None:
    """A formula within a sentence as MathML, which browsers set without a script."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display_mathml(writer, node) -> None:
    """The same for a formula on a line of its own, with room to scroll on a narrow screen."""
    formula = convert(node.astext(), display="block")
    writer.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def write_explorer(app) -> None:
    """The page in which the quickstart ends: digits, and the model that ships."""
    if EXPLORER.exists():
        return
    from tl_bilinear.explorer import explore, image_panel
    from tl_bilinear.explorer.opening import demo_panels, demo_run
    from tl_bilinear.recipes.images import TrainingConfig, load_images, train_classifier

    data = load_images()
    digits = train_classifier(data, TrainingConfig(), progress=False)
    facts = {"accuracy": f"{digits.accuracy:.3f} on {len(data.test_labels):,} other images"}
    panels = [
        *demo_panels(demo_run(progress=False)),
        image_panel(digits.model, data, title=f"Images: {data.name}", facts=facts),
    ]
    explore(panels, EXPLORER, title="tl_bilinear: explorer", open=False, progress=False)


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline_mathml, None), (display_mathml, None))
    app.connect("builder-inited", write_explorer)
    app.connect("html-page-context", local_plotly, priority=400)  # before the theme's own
    app.connect("autodoc-process-docstring", prepare_docstring, priority=100)
