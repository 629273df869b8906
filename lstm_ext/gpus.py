"""GPUs by name, as the planner of csrc/cuda/plan.cpp has to know them: for plans where the GPU itself is not there.

Sources. Multiprocessors and boost clocks: NVIDIA's data sheets of each product and its architecture white papers
(Turing, Ampere GA100 and GA102, Ada AD102, Hopper GH100, Blackwell GB202); for B200, what its driver reports. Shared
memory of a block: "Technical specifications per compute capability" in the CUDA C++ Programming Guide. How many
multiprocessors each GPC has (a group of them, within one of which a thread-block cluster lies) differs from chip to
chip; a plan takes them for equally large, and counts on one cluster less of those of 4 blocks and more, as was measured
on an H100.
The cost model asks for no memory bandwidth, and counts on the L2 cache of an H100.
"""

from __future__ import annotations

from typing import NamedTuple

# Bytes that a block may ask for, by compute capability.
_SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class Gpu(NamedTuple):
    """One model."""

    compute_capability: int  # 90 for 9.0
    sms: int  # multiprocessors
    gpcs: int  # groups of them
    boost_mhz: int

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return _SHARED_BYTES[self.compute_capability]


GPUS = {
    "T4": Gpu(75, 40, 5, 1590),
    "RTX 2080 Ti": Gpu(75, 68, 6, 1545),
    "A100": Gpu(80, 108, 7, 1410),
    "A30": Gpu(80, 56, 4, 1440),
    "A10": Gpu(86, 72, 6, 1695),
    "A40": Gpu(86, 84, 7, 1740),
    "RTX A6000": Gpu(86, 84, 7, 1800),
    "RTX 3080": Gpu(86, 68, 6, 1710),
    "RTX 3090": Gpu(86, 82, 7, 1695),
    "L4": Gpu(89, 58, 5, 2040),
    "L40S": Gpu(89, 142, 12, 2520),
    "RTX 4080": Gpu(89, 76, 7, 2505),
    "RTX 4090": Gpu(89, 128, 11, 2520),
    "H100": Gpu(90, 132, 8, 1980),  # SXM5
    "H100 PCIe": Gpu(90, 114, 8, 1755),
    "H200": Gpu(90, 132, 8, 1980),
    "B200": Gpu(100, 148, 8, 1965),
    "RTX 5080": Gpu(120, 84, 7, 2617),
    "RTX 5090": Gpu(120, 170, 11, 2407),
}


def _plain(name: str) -> str:
    """Without case, spaces, hyphens and the maker's words."""
    plain = name.casefold().replace("-", "").replace(" ", "")
    return plain.removeprefix("nvidia").removeprefix("geforce").removeprefix("tesla")


_BY_PLAIN_NAME = {_plain(name): gpu for name, gpu in GPUS.items()}


def named(name: str) -> Gpu | None:
    """The GPU of this name, such as "H100", "rtx4090" or "NVIDIA GeForce RTX 4090"; None if there is none."""
    return _BY_PLAIN_NAME.get(_plain(name))
