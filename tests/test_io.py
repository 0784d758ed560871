"""What goes to disk: whole or not at all, only over what is ours, and read back with named errors."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear import io
from tl_bilinear.io import Storable
from tl_bilinear.tensor import (
    CP,
    BilinearTensor,
    GatedLayer,
    InteractionMatrix,
    Reexpression,
    Tucker,
    approximate,
    cp,
    reexpress,
    tucker,
)


@dataclass(frozen=True)
class Leaf(Storable):
    rows: Float[Tensor, "n d"]
    scale: float = 1.0


@dataclass(frozen=True)
class Branch(Storable):
    leaves: list[Leaf]
    named: dict[str, Tensor]
    columns: Float[Tensor, " d"]
    sizes: tuple[int, ...] = ()
    note: str | None = None
    kept_out: Leaf | None = field(default=None, metadata={"stored": False})


def branch():
    leaves = [Leaf(torch.arange(6.0).reshape(3, 2)), Leaf(torch.ones(1, 2), 2.5)]
    return Branch(leaves, {"a": torch.zeros(2), "b.c": torch.ones(())}, torch.ones(2), (3, 4), "x")


def test_nested_values_come_back(tmp_path):
    path = tmp_path / "branch.safetensors"
    branch().save(path)
    for loaded in (Branch.load(path), Storable.load(path)):
        assert type(loaded) is Branch
        assert_close(loaded.leaves[0].rows, branch().leaves[0].rows)
        assert loaded.leaves[1].scale == 2.5
        assert loaded.sizes == (3, 4)
        assert loaded.note == "x"
        assert_close(loaded.named["b.c"], torch.ones(()))
        assert loaded.kept_out is None


def test_tensors_that_share_memory_are_stored(tmp_path):
    rows = torch.arange(6.0).reshape(3, 2)
    Branch([Leaf(rows), Leaf(rows)], {"a": rows[0]}, rows[1]).save(tmp_path / "x")
    loaded = Branch.load(tmp_path / "x")
    assert_close(loaded.leaves[1].rows, rows)
    assert_close(loaded.columns, rows[1])


def edited(path, change):
    """The file again, with its header or tensors changed by hand."""
    tensors, metadata = io.load_tensors(path)
    change(tensors, metadata)
    io.save_tensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("leaves[0].rows"), r"the tensor of leaves\[0\]\.rows is missing"),
        (lambda t, m: t.update(more=torch.ones(1)), r"unknown tensors \['more'\]"),
        (lambda t, m: m["fields"].pop("columns"), r"Branch lacks the fields \['columns'\]"),
        (lambda t, m: m["fields"].update(color=1), r"Branch has unknown fields \['color'\]"),
        (lambda t, m: m.update(kind="Tree"), "holds Tree, not Branch"),
        (
            lambda t, m: m["fields"]["leaves"][1]["fields"].update(scale="big"),
            r"leaves\[1\]\.scale must be float, got 'big'",
        ),
        (
            lambda t, m: m["fields"]["leaves"].append({"kind": "Nobody", "fields": {}}),
            r"leaves\[2\] is not a value of a stored result",
        ),
        (
            lambda t, m: t.update({"leaves[1].rows": torch.ones(3)}),
            r"leaves\[1\]\.rows must be .*got a tensor of shape \[3\]",
        ),
        (lambda t, m: t.update(columns=torch.ones(2).long()), "columns must be .*int64"),
        (lambda t, m: m.update(fields=3), "is not a value of a stored result"),
    ],
)
def test_damaged_files_name_the_field(tmp_path, change, message):
    path = tmp_path / "branch.safetensors"
    branch().save(path)
    with pytest.raises(ValueError, match=message) as raised:
        Branch.load(edited(path, change))
    assert str(path) in str(raised.value)


def test_shapes_agree_between_fields(tmp_path):
    path = tmp_path / "layer.safetensors"
    random_tensor(3, 4, 2).save(path)
    with pytest.raises(ValueError, match=r"right must be .*shape"):
        BilinearTensor.load(edited(path, lambda t, m: t.update(right=torch.ones(4, 5))))


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_truncated_files_are_refused(tmp_path, size):
    path = tmp_path / "x.safetensors"
    branch().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or not a result file"):
        Branch.load(path)


def test_what_cannot_be_stored_is_named(tmp_path):
    @dataclass(frozen=True)
    class Odd(Storable):
        parts: list[object]

    with pytest.raises(TypeError, match=r"parts\[1\] is a object, which cannot be stored"):
        Odd([1, object()]).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no such file"):
        Branch.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        branch().save(tmp_path / "no" / "folder")


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two stored classes are named Leaf"):
        type("Leaf", (Storable,), {"__module__": "elsewhere"})
    assert Storable._kinds["Leaf"] is Leaf


def test_every_result_of_the_tensor_package_saves(tmp_path):
    t = random_tensor(4, 6, 3, biases=True)
    written = reexpress(t, torch.randn(5, 3, dtype=torch.float64))
    small = tucker(t, 2, 3)
    shared = cp(t, 2, restarts=1, steps=3, progress=False)
    gated = GatedLayer(t.left, t.right, t.out, torch.nn.functional.silu)
    near = approximate(gated, torch.randn(50, 4), fit="neuron", warn_below=-1e9)
    x = torch.randn(7, 4, dtype=torch.float64)
    for result, evaluate in (
        (t.interaction(), lambda r: r.quadratic(x)),
        (written, lambda r: r.tensor(x)),
        (small, lambda r: r.tensor(x)),
        (shared, lambda r: r.tensor(x)),
        (near, lambda r: r.tensor(x.float())),
        (t.parts(), lambda r: sum(r(x))),
    ):
        path = tmp_path / type(result).__name__
        result.save(path)
        loaded = type(result).load(path)
        assert_close(evaluate(loaded), evaluate(result))
        assert loaded.to(torch.float32) is not None
    assert {p.name for p in tmp_path.iterdir()} >= {
        c.__name__ for c in (InteractionMatrix, Reexpression, Tucker, CP)
    }


# ---------------------------------------------------------------------- files and folders


def write_and_fail(out):
    with io.whole_directory(out, "gallery") as folder:
        (folder / "page.html").write_text("two")
        raise OSError("no space")


def test_a_folder_is_replaced_whole_and_only_by_its_kind(tmp_path):
    out = tmp_path / "out"
    with io.whole_directory(out, "gallery") as folder:
        (folder / "page.html").write_text("one")
    assert io.is_ours(out, "gallery")
    assert not io.is_ours(out, "model")
    with pytest.raises(OSError, match="no space"):
        write_and_fail(out)
    assert (out / "page.html").read_text() == "one"
    with io.whole_directory(out, "gallery") as folder:
        (folder / "other.html").write_text("three")
    assert sorted(p.name for p in out.iterdir()) == ["other.html", io.MARKER]
    with pytest.raises(FileExistsError, match="choose a new or an empty one"):
        io.require_writable(out, "model")
    with (
        pytest.raises(FileExistsError, match=r"holds other\.html"),
        io.whole_directory(out, "model"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, and writing replaces"):
        io.require_writable(out, "gallery")


@pytest.mark.parametrize("marker", ["", "[]", '{"kind": 3}', "\x00", '{"kind": "model"'])
def test_a_damaged_marker_is_not_ours(tmp_path, marker):
    (tmp_path / io.MARKER).write_text(marker)
    assert not io.is_ours(tmp_path, "model")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        io.require_writable(tmp_path / "file", "gallery")


def test_json_files(tmp_path):
    io.write_json(tmp_path / "a.json", {"x": 1})
    assert io.read_table(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is not a table of values"):
        io.read_table(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(ValueError, match=r"a\.json is not JSON, or not all of it"):
        io.read_table(tmp_path / "a.json")


def test_digests_notice_every_part():
    a, b = torch.ones(2, 3), torch.zeros(1)
    digests = {
        io.digest_of({"a": a}, {"k": 1}),
        io.digest_of({"a": a}, {"k": 2}),
        io.digest_of({"a": a.T}, {"k": 1}),
        io.digest_of({"b": a}, {"k": 1}),
        io.digest_of({"a": a.double()}, {"k": 1}),
        io.digest_of({"a": a + 1e-6}, {"k": 1}),
        io.digest_of({"a": a, "b": b}, {"k": 1}),
    }
    assert len(digests) == 7
    assert io.digest_of({"a": a, "c": None}, {"k": 1}) in digests
