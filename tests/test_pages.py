"""The package asks Linux for large pages for large results only, and keeps large workspaces."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from problems import make_problem

from smoa_kernels.backends import eager, native_unsupported_reason, pages
from smoa_kernels.backends.native import backend as native

SMAPS, LARGE_PAGES = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage")
CPU = torch.device("cpu")


def flags_at(address: int) -> set[str]:
    """Linux's flags of the mapping that contains an address."""
    inside = False
    for line in SMAPS.read_text(encoding="ascii", errors="replace").splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(rest)
    return set()


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("tokens", [16, 1024])
def test_results_ask_for_them(backend: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and (why := native_unsupported_reason(CPU)):
        pytest.skip(why)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda start, size, advice: asked.append((start, start + size)))
    monkeypatch.setattr(pages, "_ADVICE", 14)
    sizes = {"tokens": tokens, "out_features": 1024, "in_features": 1024, "ranks": (4, 4)}
    p = make_problem(**sizes, dtype=torch.float32, block_order="contiguous").on(CPU)
    module = eager if backend == "eager" else native
    y = module.forward(p.x, None, p.adapter(), "auto", None)
    dx, _, _ = module.backward(p.dy, p.x, p.adapter(), None, needs_x=True)
    assert dx is not None
    for result in (y, dx):
        first, last = result.data_ptr(), result.data_ptr() + result.nbytes
        assert any(first <= start and end <= last for start, end in asked) == (tokens == 1024)


@pytest.mark.skipif(pages._ADVICE is None, reason="a workspace is kept on Linux alone")
def test_a_workspace_where_linux_has_no_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_ADVICE", 9999)  # Linux does not know it
    pages.release()
    assert pages.workspace(torch.empty(0), pages.LARGE // 4).numel() == pages.LARGE // 4
    assert pages.release() == pages.LARGE


def test_a_workspace_that_no_memory_is_left_for() -> None:
    with pytest.raises(RuntimeError, match=f"tried to allocate {2**52} bytes"):
        pages.workspace(torch.empty(0), 2**50)


@pytest.mark.skipif(pages._ADVICE is None, reason="a workspace is kept on Linux alone")
def test_a_large_workspace_is_kept_by_its_thread() -> None:
    like, floats = torch.empty(0), pages.LARGE // 4
    pages.release()
    assert pages.workspace(like, floats - 1).numel() == floats - 1  # malloc's memory
    assert pages.release() == 0
    first = pages.workspace(like, floats + 1)
    assert first.dtype == torch.float32
    assert first.numel() > floats
    for fewer in (floats, 1):  # a small separate workspace would raise the peak
        assert pages.workspace(like, fewer).data_ptr() == first.data_ptr()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(pages.workspace, like, floats).result().data_ptr() != first.data_ptr()
    if SMAPS.exists() and LARGE_PAGES.exists():
        assert "hg" in flags_at(first.data_ptr() + pages.LARGE // 2)
    assert pages.workspace(like, 3 * floats).numel() >= 3 * floats  # larger than the first
    assert pages.release() == 12 * floats
    assert pages.release() == 0
