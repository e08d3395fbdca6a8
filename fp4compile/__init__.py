"""fp4compile: 4-bit floating point for PyTorch models, by graph rewriting."""

from fp4compile.backend import register_backend
from fp4compile.convert import Artifact, convert
from fp4compile.dynamo import last_report
from fp4compile.explain import explain
from fp4compile.formats import FORMATS, Format, register_format
from fp4compile.load import load
from fp4compile.pipeline import register_pass
from fp4compile.quantized import Quantized, dequantize, fake_quantize, quantize
from fp4compile.recipe import Recipe, register_recipe
from fp4compile.report import Report
from fp4compile.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Artifact",
    "Format",
    "Quantized",
    "Recipe",
    "Report",
    "Schedule",
    "convert",
    "dequantize",
    "explain",
    "fake_quantize",
    "last_report",
    "load",
    "quantize",
    "register_backend",
    "register_format",
    "register_pass",
    "register_recipe",
]
