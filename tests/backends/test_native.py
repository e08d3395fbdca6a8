"""The FP4 tensor cores' GEMM: the order of its scales, what it takes, and its lowering under fake CUDA tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp4compile.backend import No
from fp4compile.backends import triton as table
from fp4compile.backends.triton import native
from fp4compile.formats import FORMATS
from fp4compile.ops import OPS

FORMS = ("mxfp4", "nvfp4")
KERNEL = next(kernel for kernel in table.KERNELS if kernel.name == "cublas/fp4_mm")


def arguments(format: str, m: int, n: int, k: int, device: str = "cuda", block_2d: bool = False) -> dict[str, Any]:
    """Of the op `mm`, on tensors of the given sizes."""
    block = FORMATS[format].block

    def packed(rows: int, of_rows: int) -> tuple[Tensor, Tensor]:
        blocks = -(-k // block)
        codes = torch.empty(rows, blocks * block // 2, dtype=torch.uint8, device=device)
        return codes, torch.empty(of_rows, blocks, dtype=torch.uint8, device=device)

    (a, a_scales), (b, b_scales) = packed(m, m), packed(n, -(-n // block) if block_2d else n)
    scale = torch.empty((), device=device) if FORMATS[format].has_tensor_scale else None
    bound = OPS["mm"].signature.bind(
        a, b, None, a_scales, b_scales, scale, scale, format, format, block_2d, k, torch.bfloat16
    )
    bound.apply_defaults()
    return dict(bound.arguments)


@pytest.mark.parametrize(("rows", "blocks"), [(128, 4), (256, 16), (5, 3), (130, 9), (1, 1)])
def test_scales_lie_as_the_tensor_cores_read_them(rows: int, blocks: int) -> None:
    scales = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    got = native.swizzled(scales)
    across = -(-blocks // 4)
    assert got.shape == (-(-rows // 128) * across * 512,)
    expected = torch.zeros_like(got)
    for row in range(rows):
        for block in range(blocks):
            tile = (row // 128) * across + block // 4
            expected[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = scales[row, block]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format", FORMS)
@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(256, 384, 512), (5, 48, 96), (1, 16, 32), (130, 80, 250)])
def test_torch_accepts_the_call(format: str, block_2d: bool, m: int, n: int, k: int) -> None:
    with FakeTensorMode():
        given = arguments(format, m, n, k, block_2d=block_2d)
        assert native.packed_operands(given) is None
        assert native.sizes(given) is None
        y = native.mm(**given)
        assert (y.shape, y.dtype, y.device.type) == ((m, n), torch.bfloat16, "cuda")


def test_what_it_does_not_take() -> None:
    def reason(**changes: Any) -> str | None:
        given = arguments("nvfp4", 32, 32, 64, "meta") | changes
        return native.packed_operands(given) or native.sizes(given)

    assert reason() is None
    assert "not both packed" in str(reason(a_format=""))
    assert "not both packed" in str(reason(a_format="mxfp4"))
    assert "do not know hif4" in str(reason(a_format="hif4", b_format="hif4"))
    assert "not a multiple of 32" in str(reason(b=torch.empty(33, 32, dtype=torch.uint8, device="meta")))
    assert "not a multiple of 32" in str(reason(a=torch.empty(32, 24, dtype=torch.uint8, device="meta")))
    assert "dimensions" in str(reason(a=torch.empty(2, 32, 32, dtype=torch.uint8, device="meta")))
    scaled = arguments("mxfp4", 32, 32, 64, "meta") | {"a_tensor_scale": torch.empty((), device="meta")}
    assert "tensor scale" in str(native.sizes(scaled))


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_it_needs_fp4_tensor_cores(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    table.available.cache_clear()
    try:
        with FakeTensorMode():
            answer = KERNEL.supports(arguments("nvfp4", 32, 32, 64))
            activated = KERNEL.supports({**arguments("nvfp4", 32, 32, 64), "activation": "silu"})
        assert (getattr(answer, "reason", "") == "") == (capability >= (10, 0))
        assert isinstance(activated, No)
    finally:
        table.available.cache_clear()
