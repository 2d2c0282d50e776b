"""The deltas of a side memory as dense matrices where the model computes: few of them at once, many as they are used.

A packed delta is made dense once for a device and dtype and kept. Up to `FEW` memories are all made ready before their
first use. Of more of them, each is made dense when it is first asked for and the ones used longest ago are given up, so
that a thousand memories take no more room than the bound says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import overload

import torch
from torch import Tensor

from wisecli.memory.bits import SparseDelta

FEW = 8  # memories up to which all are dense, and the router computes every indicator
KEEP_BYTES = 1 << 30  # room for dense deltas beyond that; `FEW` of them are kept whatever they take


class DenseDeltas(Sequence[Tensor]):
    """Dense deltas [D, F], in order; safe to use from several threads.

    Args:
        packed: the stored deltas, of one shape.
        keep_bytes: what the dense ones may take together when there are more than `FEW`. A batch whose rows are
            answered by more memories than fit is slow, as they are made dense anew at each step, but never wrong.
    """

    def __init__(self, packed: Sequence[SparseDelta], keep_bytes: int = KEEP_BYTES) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._packed, self._keep_bytes = packed, keep_bytes
        self._dense: OrderedDict[int, Tensor] = OrderedDict()  # the one used last is at the end
        self._lock = Lock()

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """From here on the deltas are on this device and in this dtype, anew from the stored values."""
        with self._lock:
            if (self.device, self.dtype) != (device, dtype):
                self._dense.clear()
                self.device, self.dtype = device, dtype
            if len(self) <= FEW and not self._dense:
                self._dense.update((j, self._make(j)) for j in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[j] for j in range(len(self))[index]]
        j = range(len(self))[index]
        with self._lock:
            if j not in self._dense:
                self._dense[j] = self._make(j)
            self._dense.move_to_end(j)
            found = self._dense[j]
            while len(self._dense) > max(FEW, self._keep_bytes // max(1, found.nbytes)):
                self._dense.popitem(last=False)
            return found

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def kept(self) -> tuple[int, ...]:
        """Which are dense now, the one used last at the end."""
        with self._lock:
            return tuple(self._dense)

    def _make(self, j: int) -> Tensor:
        with torch.inference_mode(False):  # made while someone infers, it may be used later where gradients flow
            return self._packed[j].dense().to(self.device, self.dtype)
