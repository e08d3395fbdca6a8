"""Which weights of a model no captured graph reads: the GEMMs that run as they are, outside of any graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNBase

from fp4compile.capture import Frame
from fp4compile.report import Report, SiteRecord

# Classes of modules with a matrix `weight` that one GEMM reads: torch's, and GPT-2's in transformers.
LINEARS = ("Linear", "Conv1D")
_OUTSIDE = "not captured: the model breaks the graph around it"


@dataclass
class Coverage:
    """Parameters that graphs read, by their names in the model; a graph may serve several modules."""

    read: set[str] = field(default_factory=set)

    def add(self, where: Frame) -> None:
        """Take in a graph."""
        prefixes = [f"{place}." if place else "" for place in where.places]
        self.read |= {f"{prefix}{name}" for prefix in prefixes for name in where.parameters.values()}

    def complete(self, report: Report, model: nn.Module, broken: bool) -> None:
        """Name the linear modules and stacks of matrices of a model that no graph reads.

        Args:
            report: takes records of those that run outside of graphs, and notes of those that seem not to run.
            broken: whether the model breaks the graph.
        """
        named = {name for s in report.sites for name in (s.path, s.parameter.rpartition(".")[0])}
        globs = [name for name in named if "*" in name]
        for kind, path, parameter in _weights(model):
            if parameter in self.read or (kind == "linear" and _is_named(path, named, globs)):
                continue
            if broken:
                formats: dict[str, str | None] = {"input": None, "weight": None}
                report.sites.append(SiteRecord(path, "forward", kind, "refused", formats, "eager", _OUTSIDE, parameter))
            else:
                report.notes.append(f"{path if kind == 'linear' else parameter}: not called with these inputs")


def _is_named(path: str, named: set[str], globs: list[str]) -> bool:
    """Whether a module is among those that a report names, by their paths in the model or in a part of it."""
    parts = path.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return any(end in named for end in ends if end) or any(fnmatchcase(path, glob) for glob in globs)


def _weights(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Kind, module path and name of the weights that GEMMs read: of linear modules, and stacks of matrices."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if type(module).__name__ in LINEARS:
            yield "linear", path, f"{prefix}weight"
        elif isinstance(module, RNNBase):
            names = (n for n, p in module.named_parameters(recurse=False) if p.dim() == 2)
            yield from (("linear", path, f"{prefix}{name}") for name in names)
        elif not isinstance(module, _ConvNd):
            stacks = ((n, p) for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1)
            yield from (("grouped", path, f"{prefix}{name}") for name, _ in stacks)
