"""`import tl_bilinear`: light, without SAELens, without TransformerLens, with TransformerLens 4.

Each case runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

BLOCK = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocker())
"""

TENSOR_WORKS = """
import torch
from tl_bilinear import BilinearTensor
tensor = BilinearTensor(torch.randn(5, 3), torch.randn(5, 3), torch.randn(2, 5))
x = torch.randn(3)
expected = torch.stack([x @ q @ x for q in tensor.dense()])
assert torch.allclose(tensor(x), expected, atol=1e-4)
module = torch.nn.Module()
module.left, module.right, module.out = (torch.nn.Linear(3, 3) for _ in range(3))
assert BilinearTensor.from_mlp(module).has_biases
"""

FROM_CONFIG_WORKS = """
fields = dict(n_layers=1, d_model=8, d_head=4, n_ctx=4, d_vocab=5, device="cpu")
model = HookedTransformer.from_config(bilinear=True, **fields)
assert type(model) is tl_bilinear.HookedBilinearTransformer, type(model)
assert type(model.blocks[0].mlp) is tl_bilinear.BilinearMLP
assert tl_bilinear.BilinearTensor.from_model(model, 0).shape == (8, 8, 8)
assert type(HookedTransformer.from_config(act_fn="relu", **fields)) is HookedTransformer
assert HookedTransformer.__dict__["from_config"].__func__.__module__.startswith("tl_bilinear")
"""


def run(program: str, *folders: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def caught(expression: str) -> str:
    """A program that prints the ImportError which an expression raises."""
    return (
        "try:\n"
        f"    {expression}\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
        "else:\n"
        f"    raise AssertionError({expression!r} + ' raised nothing')\n"
    )


def test_import_is_light():
    heavy = (
        *("transformer_lens", "sae_lens", "transformers"),
        *("plotly", "pandas", "jinja2", "kornia", "mlxtend"),
    )
    printed = run(
        "import sys, tl_bilinear, tl_bilinear.circuits, tl_bilinear.hooks\n"
        "dir(tl_bilinear), tl_bilinear.models.register()\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n" + TENSOR_WORKS
    )
    assert printed.strip() == "[]"


def test_tl_bilinear_first_and_no_sae_lens():
    printed = run(
        BLOCK.format(blocked=("sae_lens",))
        + "import tl_bilinear\nfrom transformer_lens import HookedTransformer\n"
        + "import inspect; assert 'class HookedTransformer' in inspect.getsource(HookedTransformer)\n"
        + FROM_CONFIG_WORKS
        + TENSOR_WORKS
        + "from tl_bilinear import models\n"
        + caught("models.HookedBilinearSAETransformer")
        + "try:\n    tl_bilinear.no_such_name\nexcept AttributeError: pass\n"
    )
    assert "HookedBilinearSAETransformer needs SAELens" in printed
    assert "pip install 'sae-lens>=6.54'" in printed


def test_names_that_load_at_first_use():
    run(
        "import sys, tl_bilinear\n"
        "assert 'tl_bilinear.plots' not in sys.modules\n"
        "assert tl_bilinear.plots is sys.modules['tl_bilinear.plots']\n"
        "for name in dir(tl_bilinear): getattr(tl_bilinear, name)\n"
        "import transformer_lens\n"
        "assert tl_bilinear.HookedTransformer is transformer_lens.HookedTransformer\n"
        "from tl_bilinear import HookedTransformer\n" + FROM_CONFIG_WORKS
    )


def test_transformer_lens_first():
    run("from transformer_lens import HookedTransformer\nimport tl_bilinear\n" + FROM_CONFIG_WORKS)


def test_a_from_config_of_transformer_lens_itself_stays(tmp_path):
    package = tmp_path / "transformer_lens"
    package.mkdir()
    (package / "__init__.py").write_text("from .HookedTransformer import HookedTransformer\n")
    (package / "HookedTransformer.py").write_text(
        "class HookedTransformer:\n"
        "    @classmethod\n"
        "    def from_config(cls):\n"
        "        return 'its own'\n"
    )
    program = (
        "import tl_bilinear\n"
        "from transformer_lens import HookedTransformer\n"
        "assert HookedTransformer.from_config() == 'its own'\n"
    )
    run(program, tmp_path)


def test_without_transformer_lens():
    name = "HookedBilinearTransformer"
    printed = run(
        BLOCK.format(blocked=("transformer_lens", "sae_lens"))
        + "import tl_bilinear\n"
        + TENSOR_WORKS
        + caught(f"tl_bilinear.{name}")
        + caught(f"from tl_bilinear import {name}")
        + caught("tl_bilinear.BilinearMLP")
    )
    lines = printed.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"ImportError {name} needs TransformerLens, which is not installed")
    assert lines[1] == lines[0]
    assert lines[2].startswith("ImportError BilinearMLP needs TransformerLens")
    assert all("pip install 'transformer-lens>=3.9,<4'" in line for line in lines)


def test_training_a_language_model_needs_no_transformer_lens():
    run(
        BLOCK.format(blocked=("transformer_lens", "sae_lens"))
        + "import sys\n"
        + "from tl_bilinear.recipes.language import train_language_model, make_tokenizer\n"
        + "assert 'transformers' not in sys.modules\n"
    )


def test_with_transformer_lens_4(tmp_path):
    """Which has no HookedTransformer: here a package of that version with a bridge only."""
    package = tmp_path / "transformer_lens"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '4.3.0'\n"
        "from .model_bridge import TransformerBridge\n"
        "def __getattr__(name):\n"
        "    raise ImportError(f'{name!r} was removed in TransformerLens 4.0')\n"
    )
    (package / "model_bridge.py").write_text("class TransformerBridge: pass\n")
    for imports in (
        "import tl_bilinear\nfrom transformer_lens import TransformerBridge\n",
        "from transformer_lens import TransformerBridge\nimport tl_bilinear\n",
    ):
        printed = run(
            imports + TENSOR_WORKS + caught("tl_bilinear.HookedBilinearTransformer"), tmp_path
        )
        assert "TransformerLens 4.3.0 is installed and does not have it" in printed
        assert "pip install 'transformer-lens>=3.9,<4'" in printed


def test_another_broken_package_speaks_for_itself():
    printed = run(
        BLOCK.format(blocked=("transformers",))
        + "import tl_bilinear\n"
        + caught("tl_bilinear.HookedBilinearTransformer")
    )
    assert "No module named 'transformers" in printed
