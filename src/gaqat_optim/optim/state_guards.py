"""Buffers and gradients, kept from the second pass and from failures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parameter import Parameter, is_lazy

from ..scale_names import QUANTIZER_BUFFERS, is_scale_name

# Copying so few bytes costs no more than finding out whether it has to be done.
_SMALL_BYTES = 2**16


@dataclass(frozen=True)
class SavedBuffer:
    """A buffer as it was.

    Attributes:
        module: the module that owns it.
        name: its name there.
        tensor: the buffer itself, since a module may put another one in its place.
        version: how often it had been written in place; ``None`` for a tensor that cannot be.
        value: a copy; ``None`` where no pass was expected to write it.
    """

    module: nn.Module
    name: str
    tensor: Tensor | None
    version: int | None
    value: Tensor | None


class BufferGuard:
    """Saves the buffers of a model before a pass, and undoes what the pass did to them.

    A module that puts another tensor in a buffer's place gets the old one back: that takes no copy. Values that are
    written in place do. Small buffers are always copied: torch's BatchNorm and whoever writes through ``.data`` leave
    no sign in the version. Large ones, such as a queue of features, are copied where a pass has written them before,
    and the first time that they are seen.

    The buffers in which this package's quantizers keep their first scale are left out: a quantizer that took its scale
    in a pass keeps it.
    """

    def __init__(self) -> None:
        self._versions: dict[str, tuple[int, int | None]] = {}
        self._written: set[str] = set()

    def save(self, model: nn.Module, without: Sequence[nn.Module] = ()) -> list[SavedBuffer]:
        """The buffers of ``model`` as they are, those of the modules ``without`` left out."""
        left_out = set(without)
        saved = []
        for path, module in model.named_modules():
            if not module._buffers or module in left_out:
                continue
            is_quantizer = any(is_scale_name(name) for name in module._parameters)
            for name, buffer in module._buffers.items():
                if not (is_quantizer and name in QUANTIZER_BUFFERS):
                    saved.append(self._saved(f"{path}.{name}", module, name, buffer))
        return saved

    def _saved(self, path: str, module: nn.Module, name: str, buffer: Tensor | None) -> SavedBuffer:
        if buffer is None or is_lazy(buffer) or not _is_writable(buffer):
            return SavedBuffer(module, name, buffer, None, None)
        now = id(buffer), buffer._version
        before = self._versions.get(path)
        self._versions[path] = now
        if before is not None and before[0] == now[0] and before[1] != now[1]:
            self._written.add(path)
        expected = before is None or path in self._written
        return SavedBuffer(module, name, buffer, now[1], buffer.clone() if expected or _is_small(buffer) else None)


@torch.no_grad()
def restore_buffers(saved: Sequence[SavedBuffer], what: str) -> None:
    """Undo what happened to buffers since they were saved.

    Values are written through ``.data``, which leaves the version as it is: a graph that has saved a buffer which
    nothing has written can still run backward.

    Args:
        saved: from :meth:`BufferGuard.save`.
        what: the pass that wrote them, for the warning about a large buffer that was not expected to be written.
    """
    missed = []
    for s in saved:
        if s.module._buffers.get(s.name) is not s.tensor:
            s.module._buffers[s.name] = s.tensor
        if s.tensor is None or s.version is None:
            continue
        written = s.tensor._version != s.version
        if s.value is not None and (written or _is_small(s.tensor)):
            s.tensor.data.copy_(s.value)
        elif written:
            missed.append(f"{s.name!r} of {type(s.module).__name__}")
    if missed:
        warnings.warn(
            f"{what} wrote a large buffer that no pass before it had written, and it keeps what was written: "
            f"{', '.join(missed)}. From the next step on it is copied before each pass, and put back",
            stacklevel=2,
        )


def _is_writable(buffer: Tensor) -> bool:
    """Whether the buffer can be written in place at all, and counts how often it was."""
    if buffer.is_inference() or buffer.layout != torch.strided:
        return not buffer.is_inference()
    return all(stride != 0 or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _is_small(buffer: Tensor) -> bool:
    return buffer.numel() * buffer.element_size() <= _SMALL_BYTES


def gradient_versions(params: Sequence[Parameter]) -> list[tuple[int, int] | None]:
    """For each parameter, which tensor its ``.grad`` is and how often that was written to; ``None`` without one."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in params]


@contextmanager
def restore_on_error(params: Sequence[Parameter], saved: Sequence[SavedBuffer]) -> Iterator[None]:
    """If the block raises, ``.grad`` of ``params`` holds the tensors it held, and buffers are as they were saved."""
    owned = [p.grad for p in params]
    try:
        yield
    except BaseException:
        restore_buffers(saved, "a step that failed")
        for p, g in zip(params, owned, strict=True):
            p.grad = g
        raise


@contextmanager
def frozen_running_stats(model: nn.Module, guard: BufferGuard) -> Iterator[None]:
    """Within the block, layers in training mode normalize by batch statistics and leave the running ones untouched.

    BatchNorm layers do so with ``track_running_stats=False``: unlike momentum 0, that counts no batches and is right
    for ``momentum=None``. What other modules do to their buffers is undone when the block ends in any way.

    Args:
        model: the network.
        guard: what is known of its buffers.
    """
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    # A class with a forward of its own may do without the flag.
    untouched = [m for m in batch_norms if type(m).forward in (_BatchNorm.forward, SyncBatchNorm.forward)]
    saved = guard.save(model, without=untouched)
    try:
        for module in batch_norms:
            module.track_running_stats = False
        yield
    finally:
        for module in batch_norms:
            module.track_running_stats = True
        restore_buffers(saved, "the second pass")
