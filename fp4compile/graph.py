"""GEMM sites and their roles, verification, and the one printer of graphs.

The joint forward + backward graph of AOTAutograd tells everything: what depends only on parameters is a weight, what
depends on a tangent is backward, and a backward GEMM carries the autograd sequence number (`seq_nr`) of the forward
GEMM it belongs to.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import networkx as nx
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fp4compile.errors import RewriteError
from fp4compile.ops import OPS
from fp4compile.recipe import OPERANDS, Operand, Role
from fp4compile.report import Status

aten = torch.ops.aten


@dataclass(frozen=True)
class GemmOp:
    """Where a matmul op keeps its operands: argument positions of A and B and their contraction axes.

    Attributes:
        bias: position of what is added to the product.
        ends: position of the tensor that says where each group of tokens ends.
        scaled: the op of ours that applies tensor scales to the same product.
    """

    kind: str
    a: int
    b: int
    a_axis: int = -1
    b_axis: int = -2
    bias: int | None = None
    ends: int | None = None
    scaled: str = "mm"


# The canonical spellings; passes.canonicalise brings the others to one of them.
GEMM_OPS: Mapping[Any, GemmOp] = {
    aten.mm.default: GemmOp("linear", 0, 1),
    aten.addmm.default: GemmOp("linear", 1, 2, bias=0),
    aten.bmm.default: GemmOp("linear", 0, 1),
    aten._grouped_mm.default: GemmOp("grouped", 0, 1, ends=2, scaled="grouped_mm"),
    OPS["grouped_mm"].overload: GemmOp("grouped", 0, 1, ends=2, scaled="grouped_mm"),
}

# What they may be spelled like in graphs within the graph, which no pass brings to one spelling.
_GEMMS = {*GEMM_OPS, aten.linear.default, aten.baddbmm.default, aten.mv.default}

# Names of ops of other libraries that hide a GEMM (`somelib.grouped_mm`): found, so as to be reported.
_OPAQUE_GEMM = re.compile(r"(^|[._])(mm|matmul|linear)([._]|$)")
_NO_FASTPATH = "torch.backends.mha.set_fastpath_enabled(False) before compiling writes it out"
# Ops of torch that hide the GEMMs of whole layers -> what makes torch write them out, "" where nothing does.
FUSED_LAYERS: Mapping[Any, str] = {
    aten._transformer_encoder_layer_fwd.default: _NO_FASTPATH,
    aten._native_multi_head_attention.default: _NO_FASTPATH,
    aten._trilinear.default: "",  # nn.Bilinear
    aten.mkldnn_rnn_layer.default: "",  # nn.LSTM
}

# Modules whose GEMMs give activations, also those of learned tokens.
_LAYERS = (nn.Linear, nn.MultiheadAttention)

# Ops that count: positions are made of them.
_COUNTS = {torch.ops.prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step}

# Ops that pick matrices out of a stack.
_GATHERS = {aten.index.Tensor, aten.index_select.default}

# Ops that leave every element where it is in a contiguous tensor.
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.alias.default,
}

# Ops that move values without changing them: looking through them finds where an operand comes from.
MOVES = VIEWS | {
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.squeeze.dims,
    aten.expand.default,
    aten.clone.default,
    aten.detach.default,
}


@dataclass
class Site:
    """A GEMM that reads a weight, or belongs to one that does.

    Attributes:
        node: the matmul.
        role, kind, path, parameter: as in `report.SiteRecord`.
        arguments: operand name -> position in `node.args`.
        axes: operand name -> contraction axis, counted from the end.
        specs: what the recipe decided; None for an operand in high precision.
        status, reason: as in `report.SiteRecord`.
        kernels: kernels that will run it.
        flops: 2 M N K.
        weight_bytes: bytes of the weight in the model's dtype, and packed.
        makes_weight: whether it takes part in computing a weight, as B A of a merged LoRA does, and reads no input.
        gathered: whether each token multiplies a copy of its own of one of a stack of matrices.
    """

    node: Node
    role: Role
    kind: str
    path: str
    parameter: str
    arguments: dict[str, int]
    axes: dict[str, int]
    specs: dict[str, Operand | None] = field(default_factory=dict)
    status: Status = "kept"
    reason: str = ""
    kernels: list[str] = field(default_factory=list)
    flops: int = 0
    weight_bytes: tuple[int, int] = (0, 0)
    makes_weight: bool = False
    gathered: bool = False

    def operand(self, name: str) -> Node:
        """The node that the GEMM reads as operand `name`."""
        node = self.node.args[self.arguments[name]]
        assert isinstance(node, Node)
        return node

    def replace(self, gemm: Node, a: int = 0, b: int = 1) -> None:
        """Put a GEMM, which has its operands A and B at these positions, in the place of the site's own."""
        self.node.replace_all_uses_with(gemm)
        self.node.graph.erase_node(self.node)
        self.follow(gemm, a, b)

    def follow(self, gemm: Node, a: int = 0, b: int = 1) -> None:
        """Take over a GEMM that has replaced the site's own."""
        first = min(self.arguments.values())
        self.node = gemm
        self.arguments = {name: b if position > first else a for name, position in self.arguments.items()}

    @property
    def contracts_tokens_of_groups(self) -> bool:
        """Whether the contraction runs over the tokens of each group, as that of a grouped wgrad does."""
        op = GEMM_OPS.get(self.node.target)
        return op is not None and op.ends is not None and all(dims(self.operand(n)) == 2 for n in self.arguments)

    @property
    def where(self) -> str:
        """Role, module and source line, for messages."""
        return f"{self.role} GEMM of {self.path or '(root module)'!r} ({self.node.name}{source_line(self.node)})"


def dims(node: Node) -> int:
    """The number of dimensions of a tensor."""
    return int(node.meta["val"].dim())


def source_line(node: Node) -> str:
    """', file:line' of the user's code that made the node, or ''."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return f", {found[-1][0]}:{found[-1][1]}" if found else ""


def module_path(node: Node) -> str:
    """Path of the innermost module that a node belongs to, forward or backward; "" for the root."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def clean_path(raw: str) -> str:
    """`L['self']._modules['layers']._modules['0'].a` -> `layers.0.a`: Dynamo's source names as users write them."""
    path = re.sub(r"^[LG]\['[^']*'\]", "", raw)
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    parts = [p for p in path.split(".") if p and p not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts)


def origin(node: Node) -> Node:
    """The node whose values `node` moves: through views, transposes and casts of nothing else."""
    while node.op == "call_function" and node.target in MOVES:
        node = node.all_input_nodes[0]
    return node


def below_views(node: Node) -> Node:
    """The node under views that leave every element where it is."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def readers(node: Node, through: Container[Any] = VIEWS) -> Iterator[Node]:
    """The users of a node and of what ops `through` which one looks make of it: its views, or also moved copies."""
    for user in node.users:
        if user.target in through:
            yield from readers(user, through)
        else:
            yield user


def is_backward(node: Node) -> bool:
    """Whether a node of a joint graph belongs to the backward."""
    return "backward" in node.meta.get("partitioner_tag", "")


def digraph(graph: Graph) -> nx.DiGraph:
    """The data flow of an FX graph: an edge from each node to each of its users."""
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def _reachable(flow: nx.DiGraph, sources: Iterable[Node]) -> set[Node]:
    start = object()
    flow.add_node(start)
    flow.add_edges_from((start, source) for source in sources)
    found = nx.descendants(flow, start)
    flow.remove_node(start)
    return found


@dataclass(frozen=True)
class Flow:
    """Where values come from.

    Attributes:
        weights: node computed from parameters (and buffers and constants) alone -> the first parameter's name; what
            linear modules multiply with -> the name of their weight.
        backward: the nodes that depend on a tangent.
    """

    weights: dict[Node, str]
    backward: set[Node]


def data_flow(graph: Graph, parameters: Mapping[Node, str], buffers: Container[Node] = ()) -> Flow:
    """Classify the nodes of a joint or inference graph; `parameters` and `buffers` are inputs of it.

    What a layer makes of learned tokens or of positions depends on parameters alone and is an activation all the same.
    """
    tensors = [n for n in graph.nodes if n.op == "placeholder" and _is_tensor(n)]
    on_data = {n for n in tensors if n not in parameters and n not in buffers}
    weights = dict(parameters)
    positions: set[Node] = set()
    for node in graph.nodes:  # in topological order
        if node.op != "call_function":
            continue
        if any(source in on_data for source in node.all_input_nodes) or _applies_weight(node, weights, positions):
            on_data.add(node)
            continue
        name = next((weights[s] for s in node.all_input_nodes if s in weights), None)
        if name is not None:
            weights[node] = name
        elif node.target in _COUNTS or any(source in positions for source in node.all_input_nodes):
            positions.add(node)
    backward = _reachable(digraph(graph), [n for n in tensors if is_tangent(n)])
    for node in graph.nodes:
        if (
            node not in backward
            and _is_linear_module(node)
            and not any(n in weights for n in node.all_input_nodes[-2:])
        ):
            root = origin(node.all_input_nodes[-1])
            weights |= dict.fromkeys((root, *_moved(root)), f"{module_path(node)}.weight".removeprefix("."))
    return Flow(weights, backward)


def _applies_weight(node: Node, weights: Container[Node], positions: Container[Node]) -> bool:
    """Whether a GEMM with a weight is that of a layer: that of a known module, with a bias, or on positions.

    Any other one, where its operands depend on parameters alone, makes a weight: B A of a merged LoRA, also where a
    matrix is added to it.
    """
    op = GEMM_OPS.get(node.target)
    if op is None:
        return False
    operands = [cast(Node, node.args[i]) for i in (op.a, op.b)]
    biased = op.bias is not None and dims(cast(Node, node.args[op.bias])) == 1
    is_layer = biased or issubclass(_module_class(node), _LAYERS) or any(n in positions for n in operands)
    return is_layer and any(n in weights for n in operands)


def _module_class(node: Node) -> type:
    """The class of the innermost module that a forward node belongs to; `object` outside of any."""
    stack = node.meta.get("nn_module_stack")
    kind = next(reversed(stack.values()))[1] if stack else None
    return kind if isinstance(kind, type) else object


def _is_linear_module(node: Node) -> bool:
    """Whether a node is the GEMM of an `nn.Linear`: its weight may be masked, normed, a buffer, or handed in."""
    return issubclass(_module_class(node), nn.Linear) and node.target in (aten.mm.default, aten.addmm.default)


def _moved(node: Node) -> Iterator[Node]:
    """What ops that move values make of a node."""
    for user in node.users:
        if user.target in MOVES:
            yield user
            yield from _moved(user)


def is_tangent(node: Node) -> bool:
    """Whether a placeholder of a joint graph is an incoming gradient."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


# --- sites -----------------------------------------------------------------------------------------------------------


def find_sites(graph: Graph, parameters: Mapping[Node, str], buffers: Container[Node] = ()) -> list[Site]:
    """Every GEMM that reads a weight, and the dgrad and wgrad GEMMs that belong to it, in graph order.

    A forward GEMM has a weight operand. A backward GEMM with one is its dgrad. A backward GEMM without one is a wgrad
    when it shares the autograd sequence number of a forward site and reads the same input; the GEMMs of attention
    read no weight and share nothing with a site, so they are none.
    """
    flow = data_flow(graph, parameters, buffers)
    sites: list[Site] = []
    by_sequence: dict[Any, list[Site]] = defaultdict(list)
    by_input: dict[Node, list[Site]] = defaultdict(list)
    by_parameter: dict[str, list[Site]] = defaultdict(list)
    for node in graph.nodes:
        op = GEMM_OPS.get(node.target)
        if op is None:
            sites += (_opaque_sites(node, flow) if node.op == "call_function" else []) or _nested_sites(node, flow)
            continue
        if node not in flow.backward:
            site = _forward_site(node, op, flow)
            if site:
                by_sequence[node.meta.get("seq_nr")].append(site)
                by_input[origin(site.operand("input"))].append(site)
                by_parameter[site.parameter].append(site)
        else:
            site = _backward_site(node, op, flow, by_sequence, by_input, by_parameter)
        if site:
            sites.append(site)
    return sites


def _site(node: Node, op: GemmOp, role: Role, first: str, path: str, parameter: str, kind: str) -> Site:
    """A site whose A operand is `first`."""
    second = next(name for name in OPERANDS[role] if name != first)
    return Site(
        node,
        role,
        kind,
        path,
        parameter,
        arguments={first: op.a, second: op.b},
        axes={first: op.a_axis, second: op.b_axis},
    )


def _forward_site(node: Node, op: GemmOp, flow: Flow) -> Site | None:
    weight, parameter, gathered = _weight(node, op, flow)
    if weight is None:
        return None
    first = "input" if weight is node.args[op.b] else "weight"
    site = _site(node, op, "forward", first, _path(node, parameter), parameter, _kind(op, weight))
    site.makes_weight, site.gathered = node in flow.weights, gathered
    return site


def _weight(node: Node, op: GemmOp, flow: Flow) -> tuple[Node | None, str, bool]:
    """The operand of a GEMM that is a weight, the name of the parameter, and whether it was gathered."""
    operands = [cast(Node, node.args[op.b]), cast(Node, node.args[op.a])]
    for operand in operands:
        if operand in flow.weights:
            return operand, flow.weights[operand], False
    for operand in operands:
        stack = _stack(operand)
        if stack in flow.weights:
            return operand, flow.weights[stack], True
    return None, "", False


def _stack(node: Node) -> Node | None:
    """The stack of matrices that a batch of them was picked from, by an index of the first axis."""
    node = origin(node)
    if node.target not in _GATHERS:
        return None
    stack, *where = node.args
    first = where[0] == 0 if isinstance(where[0], int) else len(cast(list[Any], where[0])) == 1
    return cast(Node, stack) if first and dims(cast(Node, stack)) == 3 else None


def _kind(op: GemmOp, weight: Node) -> str:
    """A stack of matrices, one per expert, makes any GEMM a grouped one; a matrix that is repeated does not."""
    value = weight.meta["val"]
    stacked = value.dim() == 3 and value.shape[0] != 1 and value.stride(0) != 0 and dims(origin(weight)) > 2
    return "grouped" if stacked else op.kind


def _opaque_sites(node: Node, flow: Flow) -> list[Site]:
    """The GEMMs inside an op that no pass can open, torch's or another library's: one for each weight it reads."""
    namespace = getattr(node.target, "namespace", "aten")
    foreign = namespace not in ("aten", "prims", "fp4compile") and _OPAQUE_GEMM.search(str(node.target))
    if not foreign and node.target not in FUSED_LAYERS:
        return []
    backward = node in flow.backward
    role: Role = "dgrad" if backward else "forward"
    kind = "grouped" if "grouped" in str(node.target) else "linear"
    sites = []
    for position, argument in enumerate(node.args):
        if isinstance(argument, Node) and argument in flow.weights and dims(argument) > 1:
            parameter = flow.weights[argument]
            operands = {"grad" if backward else "input": 0, "weight": position}
            axes = dict.fromkeys(operands, -1)
            sites.append(Site(node, role, kind, _path(node, parameter), parameter, operands, axes))
    return sites


def _nested_sites(node: Node, flow: Flow) -> list[Site]:
    """The weights that GEMMs may read in graphs within the graph, as `torch.cond` and `scan` hold them."""
    owner = node.graph.owning_module
    held = [getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [m for each in held if isinstance(each, GraphModule) for m in each.modules() if isinstance(m, GraphModule)]
    if not any(inner.target in _GEMMS for body in bodies for inner in body.graph.nodes):
        return []
    role: Role = "dgrad" if node in flow.backward else "forward"
    read = dict.fromkeys(flow.weights[n] for n in node.all_input_nodes if n in flow.weights and dims(n) > 1)
    return [Site(node, role, "linear", _path(node, name), name, arguments={}, axes={}) for name in read]


def _path(node: Node, parameter: str) -> str:
    """The module that ran the GEMM, or the module inside it that owns the weight (`self.proj.weight @ x`)."""
    path, owner = module_path(node), parameter.rpartition(".")[0]
    if _is_linear_module(node):  # a parametrization of its weight lies inside of it
        return path
    return owner if owner.startswith(f"{path}." if path else "") and owner else path


def _backward_site(
    node: Node,
    op: GemmOp,
    flow: Flow,
    by_sequence: Mapping[Any, list[Site]],
    by_input: Mapping[Node, list[Site]],
    by_parameter: Mapping[str, list[Site]],
) -> Site | None:
    a, b = node.args[op.a], node.args[op.b]
    assert isinstance(a, Node) and isinstance(b, Node)
    same_sequence = by_sequence.get(node.meta.get("seq_nr"), [])
    weights = {origin(s.operand("weight")) for s in same_sequence}
    tokens = {origin(s.operand("input")) for s in same_sequence} - weights
    weight, parameter, gathered = _weight(node, op, flow)
    if weight is not None and origin(weight) not in tokens and (not gathered or origin(weight) in weights):
        owners = [s for s in same_sequence if s.parameter == parameter] or by_parameter.get(parameter, [])
        path = owners[-1].path if owners else module_path(node)
        first = "weight" if weight is a else "grad"
        return _like(_site(node, op, "dgrad", first, path, parameter, _kind(op, weight)), owners)
    grad, other = (a, b) if a in flow.backward else (b, a)
    source = origin(other)
    owners = [s for s in same_sequence if origin(s.operand("input")) is source]
    if not owners and not _leads_to_gemm(node):  # the backward of a custom autograd.Function
        owners = [s for s in by_input.get(source, []) if _has_shape(s, node)]
    if other in flow.backward or not owners:
        return None
    owner = _same_shape(owners, node) or owners[-1]
    first = "grad" if grad is a else "input"
    return _like(_site(node, op, "wgrad", first, owner.path, owner.parameter, owner.kind), [owner])


def _like(site: Site, owners: list[Site]) -> Site:
    """A backward site, in what it shares with its forward one."""
    if owners:
        site.makes_weight, site.gathered = owners[-1].makes_weight, owners[-1].gathered
    return site


def forward_of(site: Site, sites: Iterable[Site]) -> Site | None:
    """The forward GEMM that a backward one belongs to, None where that is not certain."""
    same = [s for s in sites if s.role == "forward" and (s.path, s.parameter) == (site.path, site.parameter)]
    of_call = [s for s in same if s.node.meta.get("seq_nr") == site.node.meta.get("seq_nr")]
    found = of_call or same
    return found[0] if len(found) == 1 else None


def _same_shape(owners: list[Site], node: Node) -> Site | None:
    """The owner of a shared input whose weight has the shape of this gradient, if only one has."""
    fitting = [s for s in owners if _has_shape(s, node)]
    return fitting[0] if len(fitting) == 1 else None


def _has_shape(owner: Site, node: Node) -> bool:
    """Whether a gradient has the shape of the owner's weight, either way round."""
    shapes = (n.meta["val"].shape for n in (owner.operand("weight"), node))
    weight, gradient = (sorted(map(str, shape)) for shape in shapes)
    return weight == gradient


def _leads_to_gemm(node: Node) -> bool:
    """Whether another GEMM depends on the node, as on the gradient of an activation, never on that of a weight."""
    pending, seen = [node], {node}
    while pending:
        users = set(pending.pop().users) - seen
        if any(user.target in GEMM_OPS for user in users):
            return True
        seen |= users
        pending += users
    return False


def flops(site: Site) -> int:
    """2 M N K of a GEMM, with the values that symbolic sizes were traced with."""
    out = site.node.meta["val"]
    if not isinstance(out, torch.Tensor):  # an opaque op with several results
        return 0
    a_name = min(site.arguments, key=lambda name: site.arguments[name])
    contraction = site.operand(a_name).meta["val"].shape[site.axes[a_name]]
    # Each token of a grouped contraction belongs to one of the results.
    sizes = out.shape[1:] if site.contracts_tokens_of_groups else out.shape
    total = 2
    for size in (*sizes, contraction):
        total *= size_hint(size)
    return total


def runs_on_data(site: Site) -> bool:
    """Whether a size of the GEMM depends on data, as the number of tokens of one expert in a loop does."""
    tensors = (site.node, *map(site.operand, site.arguments))
    sizes: list[Any] = [size for node in tensors for size in getattr(node.meta["val"], "shape", ())]
    return any(not isinstance(size, int) and not size.node.has_hint() for size in sizes)


def size_hint(size: Any) -> int:
    """The traced value of a size; 0 for one that depends on data."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return int(hint) if hint is not None else 0


# --- verification and printing ---------------------------------------------------------------------------------------


def verify(graph: Graph, after: str) -> None:
    """Check that a graph is well formed: nodes are defined before they are used, and inserted ones have a value.

    Args:
        after: the pass to blame.

    Raises:
        RewriteError: it is not; the message names the pass.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"pass {after!r} left a malformed graph: {error}") from error
    for node in graph.nodes:
        if node.op == "call_function" and node.meta.get("fp4compile") and "val" not in node.meta:
            raise RewriteError(f"pass {after!r} inserted {node.name} without meta['val']")


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        short = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b", "float8_e4m3fn": "f8"}
        name = str(value.dtype).removeprefix("torch.")
        match = re.fullmatch(r"([a-z]+)(\d*)", name)
        name = short.get(match[1], match[1]) + match[2] if match else short.get(name, name)
        return f"{name}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_type(v) for v in value) + ")"
    return type(value).__name__


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_argument, value)) + "]"
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return repr(value)


def _call(node: Node) -> str:
    name = str(node.target).removesuffix(".default") if node.op == "call_function" else str(node.target)
    name = "getitem" if getattr(node.target, "__name__", "") == "getitem" else name
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _about(site: Site) -> str:
    """What a GEMM is, and what became of it once the recipe has decided."""
    decided = f": {site.status}" if site.specs else ""
    return f"{site.role} {site.path or '(root)'}{decided}"


def text(graph: Graph, sites: Iterable[Site] = (), parameters: Mapping[Node, str] = MappingProxyType({})) -> str:
    """The graph, one node a line: `%name: dtype[shape] = op(args)  # what the GEMM is, or the parameter's name`."""
    about = {**parameters, **{site.node: _about(site) for site in sites}}
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
            continue
        value = "val" in node.meta and node.meta["val"] is not None
        kind = f": {_type(node.meta['val'])}" if value else ""
        body = {"placeholder": "input", "get_attr": f"attribute {node.target}"}.get(node.op) or _call(node)
        note = f"  # {about[node]}" if node in about else ""
        lines.append(f"%{node.name}{kind} = {body}{note}")
    return "\n".join(lines) + "\n"
