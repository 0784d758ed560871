"""A user's program, as mypy and pyright see it: the types are those of the objects that run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
from typing import assert_type

import torch

import tl_bilinear
from tl_bilinear import (
    BilinearTensor,
    Eigendecomposition,
    FeatureInteractions,
    HookedBilinearTransformer,
    HookedTransformer,
    load_demo_model,
    load_demo_saes,
)
from tl_bilinear.hooks import EigenComponents, LossAdded, Verification, loss_added, verify
from tl_bilinear.models import BilinearTransformerConfig, HookedBilinearSAETransformer

config = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 11}
model = HookedTransformer.from_config(
    bilinear=True, n_layers=1, d_model=8, d_head=4, n_ctx=8, d_vocab=11
)
assert_type(model, HookedBilinearTransformer)
biased = HookedTransformer.from_config(config, bilinear=True, bilinear_bias=True)
assert_type(biased, HookedBilinearTransformer)
named = BilinearTransformerConfig(n_layers=1, d_model=8, d_head=4, n_ctx=8, d_vocab=11)
assert_type(HookedTransformer.from_config(named), HookedBilinearTransformer)
assert_type(HookedTransformer.from_config(config, act_fn="relu"), HookedTransformer)
assert_type(HookedBilinearTransformer.from_config(config), HookedBilinearTransformer)
saes_too = HookedBilinearSAETransformer.from_config(config)
assert_type(saes_too, HookedBilinearSAETransformer)

tokens = torch.randint(0, 11, (2, 8))
u = model.W_U[:, 4]
assert_type(u, torch.Tensor)
eigen = BilinearTensor.from_model(model, 0).interaction(u).eigh(k=2)
assert_type(eigen, Eigendecomposition)
parts = EigenComponents(eigen, layer=0)
added = loss_added(model, tokens, {"first": parts.ablate(0)}, progress=False)
assert_type(added, LossAdded)
assert_type(verify(model, tokens, parts, progress=False), Verification)

demo = load_demo_model()
assert_type(demo, HookedBilinearSAETransformer)
saes = load_demo_saes(3)
features = FeatureInteractions(demo, 3, saes["resid_mid"], saes["mlp_out"])
assert_type(features, FeatureInteractions)
print(tl_bilinear.plots.__name__, type(model).__name__, type(demo).__name__)
"""

# What a user's types do not come from is not read: a quarter of the time. What is not read is Any, which
# assert_type refuses in the place of every type above; pyright reads it all.
NOT_READ = """
[mypy]
[mypy-transformers.*,datasets.*,tokenizers.*,safetensors.*,huggingface_hub.*,accelerate.*,wandb.*,\
sympy.*,scipy.*,pandas.*,networkx.*,plotly.*,matplotlib.*,PIL.*,IPython.*,rich.*,cvxpy.*,anywidget.*,\
torch.distributed.*,torch._inductor.*,torch._dynamo.*,torch.fx.*,torch.onnx.*,torch.export.*]
follow_imports = skip
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        env=environment,
        cwd=Path(str(arguments[-1])).parent,
        capture_output=True,
        text=True,
    )


def test_it_runs(program, unchecked, capsys):
    runpy.run_path(str(program))
    assert capsys.readouterr().out.split() == [
        *("tl_bilinear.plots", "HookedBilinearTransformer", "HookedBilinearSAETransformer")
    ]


@pytest.mark.slow
def test_mypy(program, pytestconfig):
    settings = program.with_name("mypy.ini")
    settings.write_text(NOT_READ)
    cache = pytestconfig.cache.mkdir("mypy")
    done = run("-m", "mypy", "--config-file", settings, "--cache-dir", cache, program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright(program):
    done = run("-m", "pyright", "--outputjson", "--pythonpath", sys.executable, program)
    try:
        found = json.loads(done.stdout)["generalDiagnostics"]
    except ValueError:
        pytest.skip(f"pyright does not run here: {done.stderr.strip()[-300:]}")
    assert [f"{one['range']['start']['line']}: {one['message']}" for one in found] == []
