"""What sits beside the engines and wants the machine: `python hog.py cpu|weights ...`. Nothing but the standard library.

Run as a file, so that it also works on an engine's interpreter, which has PyTorch and nothing of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK_BYTES = 64 * 2**20
PAGE_BYTES = 4096


def main() -> None:
    """Work until killed, or until the one that started it is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("cpu", "weights"))
    parser.add_argument("--cores", default="", help="core numbers, comma-separated")
    parser.add_argument("--memory-mib", type=int, default=0)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--cuda", action="store_true")
    chosen = parser.parse_args()
    if chosen.cores:
        os.sched_setaffinity(0, {int(core) for core in chosen.cores.split(",")})
    parent = os.getppid()
    work = _walk(chosen.memory_mib) if chosen.what == "cpu" else _load_again(chosen.path, _copier(cuda=chosen.cuda))
    next(work)
    sys.stdout.write("at work\n")  # whoever started it waits for this line
    sys.stdout.flush()
    for _ in work:
        if os.getppid() != parent:
            return


def _walk(memory_mib: int) -> Iterator[None]:
    """Compute, and touch a page after the other of so much memory."""
    memory = bytearray(max(PAGE_BYTES, memory_mib * 2**20))
    while True:
        for start in range(0, len(memory), PAGE_BYTES * 1024):
            memory[start : start + PAGE_BYTES * 1024 : 64] = bytes(
                len(range(start, min(len(memory), start + PAGE_BYTES * 1024), 64))
            )
            sum(i * i for i in range(2000))
        yield


def _load_again(path: Path, copy: Callable[[bytearray, int], None]) -> Iterator[None]:
    """Read every file from the disk, not from the page cache, and hand it on, again and again."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"{path}: no *.safetensors in it")
    if not sum(file.stat().st_size for file in files):
        raise SystemExit(f"{path}: nothing in it")
    held = bytearray(CHUNK_BYTES)
    while True:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                while read := os.readv(descriptor, [held]):
                    copy(held, read)
                    yield
            finally:
                os.close(descriptor)


def _copy_in_memory(held: bytearray, read: int) -> None:
    bytes(memoryview(held)[:read])


def _copier(*, cuda: bool) -> Callable[[bytearray, int], None]:
    if not cuda:
        return _copy_in_memory
    import torch

    pinned = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cuda")

    def copy(held: bytearray, read: int) -> None:
        pinned[:read].copy_(torch.frombuffer(held, dtype=torch.uint8)[:read])
        there[:read].copy_(pinned[:read], non_blocking=True)
        torch.cuda.synchronize()

    return copy


if __name__ == "__main__":
    main()
