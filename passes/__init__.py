"""Passes: one verb per file, and the default pipeline."""

if __name__ != "fp4compile.passes":
    raise ImportError("import fp4compile.passes, not the top-level folder: a second copy would register its ops twice")

from fp4compile.passes.absorb import Absorb
from fp4compile.passes.activate import Activate
from fp4compile.passes.annotate import Annotate
from fp4compile.passes.bundle import Bundle
from fp4compile.passes.canonicalise import Canonicalise
from fp4compile.passes.find_sites import FindSites
from fp4compile.passes.fold import Fold
from fp4compile.passes.fuse import Fuse
from fp4compile.passes.hoist import Hoist
from fp4compile.passes.insert_qdq import InsertQDQ
from fp4compile.passes.legalise import Legalise
from fp4compile.passes.pack import Pack
from fp4compile.passes.pad_groups import PadGroups
from fp4compile.passes.pair import Pair
from fp4compile.passes.pull_back import PullBack
from fp4compile.passes.regroup import Regroup
from fp4compile.passes.rescale import Rescale
from fp4compile.passes.rescale_groups import RescaleGroups
from fp4compile.passes.share import Share
from fp4compile.passes.stabilise import Stabilise
from fp4compile.passes.unwrap import Unwrap

PIPELINE = (
    Unwrap(),
    Canonicalise(),  # before sites are looked for, so that few spellings of a GEMM need to be known
    Regroup(),
    FindSites(),
    Annotate(),
    PadGroups(),  # after annotate, which says in what blocks; before insert_qdq, which quantises along the tokens
    InsertQDQ(),  # from here on the graph is the specification of the numerics
    Stabilise(),
    PullBack(),  # before share: the forward's transforms still stand as its specs say
    Share(),  # after stabilise: two quantisations are the same only with the same transform, rounding and blocks
    Fold(),  # before fuse: a folded weight keeps its packed form, all else becomes fake quantisation
    Fuse(),
    Pack(),
    RescaleGroups(),  # before rescale, which reports the grouped GEMMs that are left
    Rescale(),  # after pack: FP4 tensor cores are faster still
    Activate(),  # after pack: what multiplies packed activations applies none
    Pair(),  # what is left of fake quantisation is read from one tensor
    Bundle(),  # after pair and rescale, whose ops it takes apart where reading their input's own inputs is cheaper
    Absorb(),  # after pair, rescale and bundle: into whatever op now reads a tensor to quantise it
    Legalise(),
    Hoist(),  # last: behind it a weight's kernels no longer show
)

__all__ = [
    "PIPELINE",
    "Absorb",
    "Activate",
    "Annotate",
    "Bundle",
    "Canonicalise",
    "FindSites",
    "Fold",
    "Fuse",
    "Hoist",
    "InsertQDQ",
    "Legalise",
    "Pack",
    "PadGroups",
    "Pair",
    "PullBack",
    "Regroup",
    "Rescale",
    "RescaleGroups",
    "Share",
    "Stabilise",
    "Unwrap",
]
