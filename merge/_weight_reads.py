"""Linear modules whose weight their owner reads itself, instead of calling the module.

A change beside the module's own output would be missed there. Mamba, for example, multiplies by
`dt_proj.weight`, and `torch.nn.MultiheadAttention` passes `out_proj.weight` to a function. The source
of the owner's class shows such reads, so no forward pass is needed to find them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

from experthub.merge._linear_modules import is_linear
from torch import nn

# Attributes of a weight that do not depend on its entries.
METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "numel"}
)
INSPECTION = frozenset({"isinstance", "hasattr", "id", "type"})  # Functions that read no entry.
CASTS = frozenset({"to", "type", "type_as", "float", "double"})
# Functions whose result with a weight is that of a linear module, apart from the operator @.
LINEAR = frozenset({"linear", "matmul", "multi_head_attention_forward"})
# The beginnings of methods that do not run in a forward pass.
OUTSIDE = ("__init__", "_init", "init_", "reset_parameters", "tie_", "_tie", "resize_", "prune_")


@dataclass(frozen=True)
class WeightRead:
    """The way in which the owner of a linear module reads its weight.

    Args:
        owner: The path of the module whose code reads the weight.
        is_product: Whether some read is one of a linear function.
        is_called: Whether the code may also call the module.
    """

    owner: str
    is_product: bool
    is_called: bool

    @property
    def is_lost(self) -> bool:
        """True if a change beside the module cannot have an effect."""
        return not (self.is_product or self.is_called)


def find_weight_reads(model: nn.Module) -> dict[str, WeightRead]:
    """Find the linear modules whose weight is read without a call of the module.

    A module is included if the source of a module above it contains such a read, even if the model
    never gets there.

    Args:
        model: The model; its weights are not read, and may be on the device `meta`.

    Returns:
        Path of a linear module -> how its weight is read.
    """
    modules = dict(model.named_modules())
    found = {}
    for path, module in modules.items():
        if not is_linear(module):
            continue
        parts = path.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            owner, below = ".".join(parts[:depth]), ".".join(parts[depth:])
            reads = _read_class(cast(Hashable, type(modules[owner])))
            name = next(
                (n for n in reads if n == below or (n[0] == "." and path.endswith(n))), None
            )
            if name is not None:
                found[path] = WeightRead(owner, *reads[name])
                break
    return found


@cache
def _read_class(kind: Any) -> dict[str, tuple[bool, bool]]:
    """Find the attributes of a class whose weight its methods read.

    Returns:
        Dotted name below `self` -> whether a read is a linear function, and whether the attribute is
        also used in another way, such as in a call. A name below another variable starts with a dot.
    """
    methods = [(function, _list_names(function.__code__)) for function in _list_methods(kind)]
    products: dict[str, bool] = {}
    for function, names in methods:
        for name, product in _read_function(function)[0].items() if "weight" in names else ():
            products[name] = products.get(name, False) or product
    leaves = {name.rpartition(".")[2] for name in products}
    used: set[str] = set()
    for function, names in methods:
        if leaves & names:
            used |= _read_function(function)[1]
    return {name: (product, name in used or name[0] == ".") for name, product in products.items()}


def _list_names(code: CodeType) -> set[str]:
    """List the attributes that a function uses; parsing its source takes much longer."""
    inner = (_list_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return {*code.co_names}.union(*inner)


def _list_methods(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """List the methods of a class that may run in a forward pass, inherited ones included."""
    seen = {*vars(nn.Module)} - {"forward"}
    for base in kind.__mro__:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and name not in seen:
                seen.add(name)
                if not name.startswith(OUTSIDE):
                    yield function


@cache
def _read_function(function: FunctionType) -> tuple[dict[str, bool], set[str]]:
    """Find the attributes whose weight a method reads, and those that it uses in another way.

    Returns:
        Dotted name, as in `_read_class` -> whether a read is a linear function; the other names.
    """
    products: dict[str, bool] = {}
    used: set[str] = set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # The method was not read from a file.
        return products, used
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        name = _dotted_name(node)
        if name is None or not isinstance(node, ast.Attribute):
            continue
        if not isinstance(above[node], ast.Attribute):
            used.add(name)
        own = name.removesuffix(".weight")
        if (
            own not in (name, "")
            and isinstance(node.ctx, ast.Load)
            and not _reads_no_entry(node, above)
        ):
            products[own] = products.get(own, False) or _is_product(node, above)
    return products, used


def _dotted_name(node: ast.AST) -> str | None:
    """Return `a.b` for the expression `self.a.b`, and `.a.b` for `x.a.b`; None for others."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    own = isinstance(node, ast.Name) and node.id == "self"
    return ".".join(names if own else ["", *names]) if names else None


def _reads_no_entry(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    """Return whether an expression looks at a weight without reading its entries."""
    parent = above[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr in METADATA
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in INSPECTION
    return isinstance(parent, ast.Compare)  # `weight is None`


def _is_product(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    """Return whether a weight is used as a linear module uses it."""
    parent = above[node]
    while isinstance(parent, (ast.Attribute, ast.keyword)) or (
        isinstance(parent, ast.Call) and node is parent.func
    ):  # A cast is followed to the use of its result.
        if isinstance(parent, ast.Attribute) and parent.attr not in CASTS:
            return False
        node, parent = parent, above[parent]
    if isinstance(parent, ast.BinOp):
        return isinstance(parent.op, ast.MatMult) and parent.left is node
    if not isinstance(parent, ast.Call):
        return False
    func = parent.func
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name in LINEAR
