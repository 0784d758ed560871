"""Small bugs, one by one: every change of a source file that a mutant may make, and how to make it live.

A change stands inside a function: an operator exchanged, a number, truth value or default moved, a
keyword argument or a statement dropped, a branch swapped, `max` for `min`, `abs` left out. Left out are
the words of messages, annotations, what runs at import (constants, dataclass fields), and the arguments
that only say where or how loudly something runs.
"""

from __future__ import annotations

import ast
import gc
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_OPERATORS = (
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn),
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr),
)  # fmt: skip
EXCHANGED: dict[type, type] = {a: b for pair in _OPERATORS for a, b in (pair, pair[::-1])}
EXCHANGED |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
_PAIRS = ("max min", "amax amin", "argmax argmin", "all any", "floor ceil", "clamp_min clamp_max")
RENAMED = {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])}
DROPPED = {"abs", "sqrt", "square", "clamp", "flip", "neg", "mT", "T"}  # x.abs() becomes x
QUIET = {"device", "progress", "desc", "unit", "total", "stacklevel", "leave", "disable"}


@dataclass
class Change:
    """One small bug: where it is, what it does in words, and what does it to the parsed file."""

    function: str
    start: int  # the function's line of `def`
    line: int
    words: str
    apply: Callable[[], None]
    default: tuple[str, int, object] | None = None  # of an argument: kind, place, other value


def changes(tree: ast.Module) -> list[Change]:
    """Every change of a file, in the order in which they stand there."""
    return [change for name, node in _functions(tree.body, "") for change in _inside(name, node)]


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def _inside(name: str, function: ast.FunctionDef) -> Iterator[Change]:
    def change(node: ast.AST, new: str, apply: Callable[[], None]) -> Change:
        old = ast.unparse(node).splitlines()[0]
        return Change(name, function.lineno, node.lineno, f"{old}  ->  {new}", apply)  # type: ignore[attr-defined]

    arguments = function.args
    for kind, values in (("args", arguments.defaults), ("kw", arguments.kw_defaults)):
        for place, value in enumerate(values):
            for other in _other_constants(value) if value is not None else []:
                found = change(value, f"{other!r} as default", lambda: None)  # type: ignore[arg-type]
                found.default = (kind, place, other)
                yield found
    pending: list[tuple[ast.AST, str, int | None]] = [
        (function, "body", place) for place in reversed(range(len(function.body)))
    ]
    while pending:
        parent, field, place = pending.pop()
        value = getattr(parent, field)
        node = value if place is None else value[place]
        if isinstance(node, ast.JoinedStr) or field in ("annotation", "returns", "decorator_list"):
            continue

        def put(
            new: ast.AST, parent: ast.AST = parent, field: str = field, place: int | None = place
        ) -> Callable[[], None]:
            def apply() -> None:
                if place is None:
                    setattr(parent, field, new)
                else:
                    getattr(parent, field)[place] = new

            return apply

        for new in _replacements(node):
            yield change(node, ast.unparse(new), put(ast.copy_location(new, node)))
        inner = [
            (node, each, None if isinstance(child, ast.AST) else number)
            for each, child in ast.iter_fields(node)
            for number, one in enumerate(child if isinstance(child, list) else [child])
            if isinstance(one, ast.AST)
        ]
        pending += reversed(inner)


def _other_constants(node: ast.expr) -> list[object]:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (bool, int, float)):
        return []
    if isinstance(node.value, bool):
        return [not node.value]
    return [node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0]


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node; the nodes below it are shared."""
    if isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _other_constants(node))
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            ops = [*node.ops[:place], EXCHANGED[type(op)](), *node.ops[place + 1 :]]
            yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in EXCHANGED:
        yield ast.BinOp(node.left, EXCHANGED[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in EXCHANGED:
        yield ast.AugAssign(node.target, EXCHANGED[type(node.op)](), node.value)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(EXCHANGED[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If) and not isinstance(
        node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)
    ):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Call):
        called = node.func
        if isinstance(called, ast.Attribute):
            if called.attr in RENAMED:
                other = ast.Attribute(called.value, RENAMED[called.attr], called.ctx)
                yield ast.Call(other, node.args, node.keywords)
            elif called.attr in DROPPED:
                yield called.value
        elif isinstance(called, ast.Name) and called.id in RENAMED:
            yield ast.Call(ast.Name(RENAMED[called.id], ast.Load()), node.args, node.keywords)
        elif isinstance(called, ast.Name) and called.id == "abs":
            yield node.args[0]
        for place, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in QUIET:
                rest = node.keywords[:place] + node.keywords[place + 1 :]
                yield ast.Call(node.func, node.args, rest)


def make_live(path: Path, index: int) -> Change:
    """Put one change into the functions of this process: whoever has imported them has it."""
    tree = ast.parse(path.read_text())
    change = changes(tree)[index]
    change.apply()
    module = compile(ast.fix_missing_locations(tree), str(path), "exec")
    code = _code(module, change)
    found = 0
    for each in gc.get_objects():
        if type(each) is not types.FunctionType:  # isinstance would wake lazy objects
            continue
        live = each.__code__
        if live.co_filename != str(path) or live.co_qualname != change.function:
            continue
        if not (code.co_firstlineno <= live.co_firstlineno <= change.start):
            continue  # a property's getter and setter have one name
        found += 1
        if change.default is None:
            each.__code__ = code
        else:
            kind, place, other = change.default
            if kind == "args":
                values = list(each.__defaults__ or ())
                values[place] = other
                each.__defaults__ = tuple(values)
            else:
                name = _keyword_only(tree, change)[place]
                each.__kwdefaults__ = {**(each.__kwdefaults__ or {}), name: other}
    if not found:
        raise LookupError(f"{path.name}: {change.function} is not live")
    return change


def _keyword_only(tree: ast.Module, change: Change) -> list[str]:
    for name, node in _functions(tree.body, ""):
        if name == change.function and node.lineno == change.start:
            return [each.arg for each in node.args.kwonlyargs]
    raise LookupError(change.function)


def _code(module: types.CodeType, change: Change) -> types.CodeType:
    pending = [module]
    while pending:
        code = pending.pop()
        for each in code.co_consts:
            if isinstance(each, types.CodeType):
                if each.co_qualname == change.function and (
                    each.co_firstlineno
                    <= change.start
                    <= max(line for *_, line in each.co_lines() if line)
                ):
                    return each
                pending.append(each)
    raise LookupError(change.function)
