"""What a second pass must not change: buffers and running statistics. After an error, gradients too are restored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parameter import Parameter, is_lazy

from ...scale_names import QUANTIZER_BUFFERS, is_scale_name

# Copying so few bytes costs no more than finding out whether they have to be copied.
_SMALL_BYTES = 2**16


@dataclass(frozen=True)
class SavedBuffer:
    """A buffer of ``module`` as it was."""

    module: nn.Module
    name: str
    tensor: Tensor | None  # the buffer itself, since a module may replace it
    version: int | None  # the number of writes in place; None for a tensor that cannot be written
    value: Tensor | None  # a copy; None for a large buffer that no pass has written so far


class BufferGuard:
    """Saves the buffers of a model before a pass, for :func:`restore_buffers` after it.

    A buffer that a module replaces is put back, which takes no copy. A buffer that is written in place needs one.
    Small buffers are always copied: writes by torch's BatchNorm, or through ``.data``, do not show in the version.
    Large ones, such as a queue of features, are copied if an earlier pass has written them, and the first time.

    The buffers of this package's quantizers are left out: a scale that a pass has initialized stays initialized.
    """

    def __init__(self) -> None:
        self._versions: dict[str, tuple[int, int | None]] = {}
        self._written: set[str] = set()

    def save(self, model: nn.Module, without: Sequence[nn.Module] = ()) -> list[SavedBuffer]:
        """The buffers of ``model``, except for the modules in ``without``."""
        excluded = set(without)
        saved = []
        for path, module in model.named_modules():
            if not module._buffers or module in excluded:
                continue
            is_quantizer = any(is_scale_name(name) for name in module._parameters)
            for name, buffer in module._buffers.items():
                if not (is_quantizer and name in QUANTIZER_BUFFERS):
                    saved.append(self._saved(f"{path}.{name}", module, name, buffer))
        return saved

    def _saved(self, path: str, module: nn.Module, name: str, buffer: Tensor | None) -> SavedBuffer:
        if buffer is None or is_lazy(buffer) or not _is_writable(buffer):
            return SavedBuffer(module, name, buffer, None, None)
        current = id(buffer), buffer._version
        last = self._versions.get(path)
        self._versions[path] = current
        if last is not None and last[0] == current[0] and last[1] != current[1]:
            self._written.add(path)
        needs_copy = last is None or path in self._written or _is_small(buffer)
        return SavedBuffer(module, name, buffer, current[1], buffer.clone() if needs_copy else None)


@torch.no_grad()
def restore_buffers(saved: Sequence[SavedBuffer], source: str) -> None:
    """Give buffers the tensors and values that were saved.

    Values are written through ``.data``, which leaves the version as it is: a graph that has saved a buffer for its
    backward can then still run it. A large buffer without a copy makes a warning, which names the ``source``.
    """
    lost = []
    for buffer in saved:
        if buffer.module._buffers.get(buffer.name) is not buffer.tensor:
            buffer.module._buffers[buffer.name] = buffer.tensor
        if buffer.tensor is None or buffer.version is None:
            continue
        was_written = buffer.tensor._version != buffer.version
        if buffer.value is not None and (was_written or _is_small(buffer.tensor)):
            buffer.tensor.data.copy_(buffer.value)
        elif was_written:
            lost.append(f"{buffer.name!r} of {type(buffer.module).__name__}")
    if lost:
        warnings.warn(
            f"{source} wrote a large buffer that no pass before it had written, and it keeps what was written: "
            f"{', '.join(lost)}. From the next step on it is copied before each pass, and put back",
            stacklevel=2,
        )


def _is_writable(buffer: Tensor) -> bool:
    """Whether the buffer can be written in place, and has a version."""
    if buffer.is_inference():
        return False
    if buffer.layout != torch.strided:
        return True
    return all(stride != 0 or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _is_small(buffer: Tensor) -> bool:
    return buffer.numel() * buffer.element_size() <= _SMALL_BYTES


@contextmanager
def restore_on_error(params: Sequence[Parameter], saved: Sequence[SavedBuffer]) -> Iterator[None]:
    """If the block raises, restore the buffers, and the tensors that were ``.grad`` of ``params``."""
    original_grads = [p.grad for p in params]
    try:
        yield
    except BaseException:
        restore_buffers(saved, "a step that failed")
        for p, g in zip(params, original_grads, strict=True):
            p.grad = g
        raise


@contextmanager
def frozen_running_stats(model: nn.Module, guard: BufferGuard) -> Iterator[None]:
    """Within the block, BatchNorm in training mode uses batch statistics and leaves its running ones alone.

    ``track_running_stats=False`` does that. Momentum 0 would still count batches, and is wrong for ``momentum=None``.
    The buffers of other modules are restored at the end of the block, error or not.
    """
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    # A subclass with a forward of its own may ignore the flag: its buffers are saved.
    guarded_by_flag = [m for m in batch_norms if type(m).forward in (_BatchNorm.forward, SyncBatchNorm.forward)]
    saved = guard.save(model, without=guarded_by_flag)
    try:
        for module in batch_norms:
            module.track_running_stats = False
        yield
    finally:
        for module in batch_norms:
            module.track_running_stats = True
        restore_buffers(saved, "the second pass")
