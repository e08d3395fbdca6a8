"""What a captured inference graph asks of each weight: packed how, for which GEMMs, or why it cannot be.

    %codes, %scales = quantize(%q_proj.weight, 'hif4', 1)
    ->
    'q_proj.weight': PackedWeight(shape, axis=1, weight=Operand('hif4'))

Read behind `insert_qdq`, where the graph is the specification of the numerics.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map_only

from fp4compile import experts, source
from fp4compile.backend import No
from fp4compile.coverage import LINEARS
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.explain import explain, failure
from fp4compile.graph import Site, origin
from fp4compile.ops import OPS
from fp4compile.packed import PackedWeight
from fp4compile.pipeline import Context, Pass, default_pipeline
from fp4compile.recipe import Operand, Recipe
from fp4compile.report import Report, SiteRecord

_LAST_PASS = "insert_qdq"
# Kind of a GEMM -> the op that multiplies with its packed weight.
_RUNS = {"linear": "fp4compile.mm", "grouped": "fp4compile.grouped_mm_packed"}


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Every name of the state dict -> all names of that tensor, itself among them."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _quantize_of(operand: Node) -> Node | None:
    """The quantize whose dequantised result the operand is, seen through permutes."""
    node = origin(operand)
    if node.target is not OPS["dequantize"].overload:
        return None
    item: Any = node.args[0]
    return item.args[0]


@dataclass
class _Plan:
    """Collects what the GEMMs of the captured graphs ask of each weight.

    Attributes:
        model: the meta model.
        weights: parameter name -> how it is packed.
        users: parameter name -> the first GEMM that reads it, for messages.
        refused: GEMM (path, parameter) -> why its weight cannot be stored packed.
        tied: parameter name -> all names of that parameter.
    """

    model: nn.Module
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    users: dict[str, Site] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.tied = tied_names(self.model)

    def observe(self, step: Pass | None, graph: Graph, context: Context) -> None:
        """Read the decisions once the quantisations stand in the graph."""
        if step is None or step.name != _LAST_PASS:
            return
        for site in context.sites:
            self._add(site, context)

    def _add(self, site: Site, context: Context) -> None:
        name = self.tied.get(site.parameter, [site.parameter])[0]
        row = self._row(site, name, context) if site.status == "fp4" else None
        if isinstance(row, No):
            self.refused[site.path, site.parameter] = row.reason
            return
        first = self.users.setdefault(name, site)
        known = self.weights.get(name)
        if first is not site and row != known:
            raise FP4ValueError(
                f"weight {name!r} is read by two GEMMs that ask for different things, so it cannot be stored "
                f"once: the {first.where} wants {_spelled(known)}, the {site.where} wants {_spelled(row)}. "
                "Give both the same rule, or keep both"
            )
        if row is not None:
            self.weights[name] = row

    def _row(self, site: Site, name: str, context: Context) -> PackedWeight | No:
        """How the weight of an FP4 GEMM is packed, or why it cannot be."""
        if site.specs.get("weight") is None:
            return No("only its activation is to be quantised; a packed layer needs an FP4 weight")
        owners = {n.rpartition(".")[0]: n.rpartition(".")[2] for n in self.tied.get(name, [])}
        quantize = _quantize_of(site.operand("weight"))
        args: Any = quantize.args if quantize else (None,)
        if not owners or context.parameters.get(args[0]) != site.parameter:
            return No(f"its weight is computed in the graph from {site.parameter!r}, not read")
        for path, attribute in owners.items():
            reason = self._unpackable(path, attribute)
            if reason is not None:
                return No(reason)
        shape = tuple(map(int, args[0].meta["val"].shape))
        weight, given = (_nearest(site.specs.get(n)) for n in ("weight", "input"))
        assert weight is not None
        return PackedWeight(shape, args[2] % len(shape), weight, given)

    def _unpackable(self, path: str, attribute: str) -> str | None:
        """Why no layer takes the place of a module's packed parameter, or None."""
        module = self.model.get_submodule(path)
        kind = type(module).__name__
        if module.get_parameter(attribute).dim() == 3:
            reason = experts.refusal(module, attribute)
            return reason if reason is None else f"its weight is {path}.{attribute}; {reason}"
        known = kind in LINEARS and attribute == "weight"
        return None if known else f"its weight is {path}.{attribute} of a {kind}; packed layers: {', '.join(LINEARS)}"


def _nearest(spec: Operand | None) -> Operand | None:
    """Chance and gradients are for training; what is stored and served is rounded to nearest, with fixed signs."""
    return replace(spec, rounding="nearest", signs="fixed", clip_mask=False) if spec else None


def _spelled(row: PackedWeight | None) -> str:
    if row is None:
        return "high precision"
    given = f", input {row.input}" if row.input else ""
    return f"{row.weight} along axis {row.axis}{given}"


def _inputs(model: Any, given: Any) -> dict[str, Any]:
    """Keyword arguments on the meta device to capture the model with: the user's, or made from the config.

    Raises:
        FP4ValueError: none were given, and nothing is known of the model's main input.
        FP4TypeError: positional ones that `forward` does not take.
    """
    signature = inspect.signature(model.forward)
    inputs: dict[str, Any]
    if given is None:
        with torch.device("meta"):
            inputs = dict(source.example_inputs(model, source.Request()))
    elif isinstance(given, Mapping):
        inputs = dict(given)
    else:
        args = given if isinstance(given, tuple | list) else (given,)
        try:
            inputs = dict(signature.bind(*args).arguments)
        except TypeError as error:
            raise FP4TypeError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    if "use_cache" in signature.parameters:
        inputs.setdefault("use_cache", False)  # a cache is filled, not read: no GEMM depends on it
    return tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)


def _passes() -> list[str]:
    names = [step.name for step in default_pipeline().passes]
    return names[: names.index(_LAST_PASS) + 1]


def decide(model: nn.Module, given: Any, recipe: Recipe, strict: bool) -> tuple[Report, dict[str, PackedWeight]]:
    """Capture the meta model and let the recipe decide: the report, and packed weights by parameter."""
    plan = _Plan(model)
    report = _capture(model, _inputs(model, given), recipe, plan)
    unread = _unread(model, plan, report)
    report.sites = [_settled(site, plan) for site in report.sites] + _lost_experts(unread, recipe)
    refused = [site for site in report.sites if site.status == "refused"]
    if refused and strict:
        raise FP4ValueError(_refusal(refused, recipe))
    forward = [spec for rule in recipe.rules if rule.role == "forward" for spec in rule.operands.values()]
    if any(spec.draws for spec in forward if spec):
        report.notes.append("stochastic rounding of the recipe's forward rules becomes rounding to nearest")
    if unread:
        report.notes.append(f"read by no GEMM found here, stored as they are: {', '.join(unread)}")
    return report, plan.weights


def _capture(model: nn.Module, inputs: dict[str, Any], recipe: Recipe, plan: _Plan) -> Report:
    try:
        return explain(model, inputs, recipe, passes=_passes(), observe=plan.observe)
    except (FP4ValueError, FP4TypeError):
        raise
    except Exception as error:  # whatever the model's own code raises on these inputs
        raise FP4ValueError(
            f"cannot capture {type(model).__name__} on the meta device with inputs {', '.join(inputs)}: "
            f"{failure(error)}. Other example_inputs may do"
        ) from error


def _settled(site: SiteRecord, plan: _Plan) -> SiteRecord:
    """The record of a GEMM, now that it is known whether its weight can be stored packed."""
    reason = plan.refused.get((site.path, site.parameter))
    if reason:
        return replace(site, status="refused", formats=dict.fromkeys(site.formats), reason=reason)
    return replace(site, kernel=_RUNS[site.kind]) if site.status == "fp4" else site


def _refusal(refused: Sequence[SiteRecord], recipe: Recipe) -> str:
    lines = [f"  {site.path or site.parameter}: {site.reason}" for site in refused[:8]]
    more = [f"  and {len(refused) - 8} more"] if len(refused) > 8 else []
    keep = sorted({site.path or site.parameter for site in refused})[:8]
    return "\n".join(
        [
            f"recipe {recipe.name!r} asks for {len(refused)} GEMM(s) in FP4 that cannot be:",
            *lines,
            *more,
            f"Keep them (keep={keep}), or pass strict=False to leave such GEMMs in high precision.",
        ]
    )


def _unread(model: nn.Module, plan: _Plan, report: Report) -> list[str]:
    """Matrices that no GEMM site reads and that are no embedding: convolutions, tables, experts not found."""
    read = {name for site in report.sites for name in plan.tied.get(site.parameter, [site.parameter])}
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    large = (n for n, p in model.named_parameters() if p.dim() > 1 and max(p.shape) != p.numel())
    return [n for n in large if n not in read | tables and not _is_bias_of_stack(model, n)]


def _is_bias_of_stack(model: nn.Module, name: str) -> bool:
    """Whether a matrix has a row for each expert of a module whose weights are stacks."""
    owner = model.get_submodule(name.rpartition(".")[0])
    stacks = (p for p in owner.parameters(recurse=False) if p.dim() == 3)
    shape = model.get_parameter(name).shape
    return len(shape) == 2 and any(shape[0] == stack.shape[0] for stack in stacks)


def _lost_experts(unread: Sequence[str], recipe: Recipe) -> list[SiteRecord]:
    """Stacks of experts that the recipe wants and whose GEMMs the capture does not show: not left out in silence."""
    records = []
    for name in unread:
        path = name.rpartition(".")[0]
        rule = recipe.rule_for(path, "forward")
        wanted = (
            rule
            and any(rule.operands.values())
            and not (recipe.kept_by(path, "forward") or recipe.kept_by(name, "forward"))
        )
        if "expert" in path and wanted:
            reason = "no GEMM that reads these experts was found in the graph"
            formats: dict[str, str | None] = {"input": None, "weight": None}
            records.append(SiteRecord(path, "forward", "grouped", "refused", formats, "", reason, name))
    return records
