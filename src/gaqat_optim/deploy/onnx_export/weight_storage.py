"""How weights are stored in an ONNX file: in their own number of bits, and as INT8 once a runtime has loaded them.

A DequantizeLinear directly on narrow codes has no integer kernels. So each constant of narrow codes is followed by
operators that make INT8 of it, shifted up to where the layer wants its codes in the 8 bits. Their inputs are constant,
and onnxruntime computes them once, when it loads the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bit_planes import pack_bits
from ..qdq import WEIGHT_BITS, WEIGHT_SHIFT
from .graph_cleanup import prepend

_WIDEST_INT4 = 4
_WIDEST_PLANES = 7


def store_int4(proto: Any) -> None:
    """Store codes of up to 4 bits as INT4."""
    import onnx

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    weights = _weights(proto, _WIDEST_INT4)
    nodes: list[Any] = []
    unpacked = {}
    for number, (name, (_, shift)) in enumerate(weights.items()):
        codes = onnx.numpy_helper.to_array(stored[name]) >> shift
        packed = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, codes.shape, pack_int4(codes), raw=True)
        stored[name].CopyFrom(packed)
        nodes += _shifted_to_int8(name, shift, f"gaqat.{number}")
        unpacked[name] = nodes[-1].output[0]
    for shift in sorted({shift for _, shift in weights.values()} - {0}):
        proto.graph.initializer.append(onnx.helper.make_tensor(_power(shift), onnx.TensorProto.INT32, [], [2**shift]))
    prepend(proto.graph, nodes, unpacked)


def store_planes(proto: Any) -> None:
    """Store codes of up to 7 bits as planes (:func:`~gaqat_optim.deploy.bit_planes.pack_bits`), as one UINT8 constant.

    A byte of plane p holds bit p of eight codes. A table of 256 rows gives what each such byte adds to its eight codes,
    so that one lookup in each plane and the union of the planes are the codes: no intermediate result is larger than
    the INT8 weight, but for the planes' bytes as indices.
    """
    import onnx

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    tables = _Tables()
    nodes: list[Any] = []
    unpacked = {}
    for number, (name, (bits, shift)) in enumerate(_weights(proto, _WIDEST_PLANES).items()):
        codes = onnx.numpy_helper.to_array(stored[name])
        stored[name].CopyFrom(onnx.numpy_helper.from_array(pack_bits(codes >> shift, bits), name))
        nodes += _codes_of_planes(name, codes.shape, bits, shift, f"gaqat.{number}", tables)
        unpacked[name] = nodes[-1].output[0]
    proto.graph.initializer.extend(tables.constants.values())
    prepend(proto.graph, [*tables.nodes, *nodes], unpacked)


def pack_int4(codes: NDArray[np.int8]) -> bytes:
    """Two codes to a byte, the first one in the lower half: ONNX's order.

    >>> pack_int4(np.array([1, -1, 7], dtype=np.int8)).hex()
    'f107'
    """
    nibbles = np.zeros(codes.size + codes.size % 2, dtype=np.uint8)
    nibbles[: codes.size] = codes.reshape(-1).view(np.uint8) & 0x0F
    return (nibbles[0::2] | nibbles[1::2] << 4).tobytes()


def _weights(proto: Any, widest: int) -> dict[str, tuple[int, int]]:
    """The stored codes of up to ``widest`` bits, by name: how many bits they have and how far they are shifted up.

    Where layers of different widths share a constant, for its values are the same, those of any layer will do.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        noted = {e.key: int(e.value) for e in node.metadata_props if e.key in (WEIGHT_BITS, WEIGHT_SHIFT)}
        if noted.get(WEIGHT_BITS, widest + 1) <= widest and node.input[0] in stored:
            found[node.input[0]] = noted[WEIGHT_BITS], noted[WEIGHT_SHIFT]
    return dict(sorted(found.items()))


def _shifted_to_int8(name: str, shift: int, short: str) -> list[Any]:
    """Operators that give the INT4 constant ``name`` times 2^shift, as INT8."""
    from onnx import TensorProto
    from onnx.helper import make_node

    if shift == 0:
        return [make_node("Cast", [name], [short], to=TensorProto.INT8)]
    return [
        make_node("Cast", [name], [f"{short}_int32"], to=TensorProto.INT32),  # INT8 has no product.
        make_node("Mul", [f"{short}_int32", _power(shift)], [f"{short}_shifted"]),
        make_node("Cast", [f"{short}_shifted"], [short], to=TensorProto.INT8),
    ]


def _power(shift: int) -> str:
    return f"gaqat.two_to_the_{shift}"


def _codes_of_planes(
    name: str, shape: tuple[int, ...], bits: int, shift: int, short: str, tables: _Tables
) -> list[Any]:
    """Operators that give the codes in the planes ``name`` times 2^shift, as INT8."""
    from onnx import TensorProto
    from onnx.helper import make_node

    planes = [f"{short}_{p}" for p in range(bits)]
    nodes = [
        make_node("Cast", [name], [f"{short}_bytes"], to=TensorProto.INT32),
        make_node("Split", [f"{short}_bytes"], planes, axis=0, num_outputs=bits),
    ]
    found = ""
    for p, plane in enumerate(planes):
        worth = 2 ** (p + shift)  # In two's complement the highest bit counts negative.
        nodes.append(make_node("Gather", [tables.of(worth if p < bits - 1 else -worth), plane], [f"{plane}_codes"]))
        if p > 0:
            nodes.append(make_node("BitwiseOr", [found, f"{plane}_codes"], [f"{plane}_union"]))
        found = nodes[-1].output[0]
    count = int(np.prod(shape))
    if count % 8:  # The last bytes have bits that stand for nothing.
        flat, start, end = (tables.integers(v) for v in ([-1], [0], [count]))
        nodes.append(make_node("Reshape", [found, flat], [f"{short}_flat"]))
        nodes.append(make_node("Slice", [f"{short}_flat", start, end], [f"{short}_cut"]))
        found = f"{short}_cut"
    nodes.append(make_node("Reshape", [found, tables.integers(list(shape))], [short]))
    return nodes


class _Tables:
    """The constants that all weights share: what a byte adds to its eight codes, as INT8 of shape (256, 8).

    A table is made by operators too. In the file it would take as much room as a small layer.
    """

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}
        self.nodes: list[Any] = []
        self._made: dict[int, str] = {}

    def of(self, worth: int) -> str:
        """The table in which a bit that is set counts ``worth``."""
        from onnx import TensorProto
        from onnx.helper import make_node

        if not self._made:
            every_byte = self._constant("gaqat.every_byte", np.arange(256, dtype=np.uint8).reshape(256, 1))
            place = self._constant("gaqat.place", (1 << np.arange(8)).astype(np.uint8))
            self.nodes += [  # Not by BitShift, with which OpenVINO 2026.4 got these tables wrong.
                make_node("BitwiseAnd", [every_byte, place], ["gaqat.bits_of_bytes"]),
                make_node("Cast", ["gaqat.bits_of_bytes"], ["gaqat.bits_set"], to=TensorProto.BOOL),
                make_node("Cast", ["gaqat.bits_set"], ["gaqat.bits"], to=TensorProto.INT32),
            ]
        if worth not in self._made:
            table = self._made[worth] = f"gaqat.table_{worth}"
            factor = self._constant(f"gaqat.worth_{worth}", np.array(worth, dtype=np.int32))
            self.nodes += [
                make_node("Mul", ["gaqat.bits", factor], [f"{table}_int32"]),
                make_node("Cast", [f"{table}_int32"], [table], to=TensorProto.INT8),
            ]
        return self._made[worth]

    def integers(self, values: list[int]) -> str:
        """A constant of INT64, for shapes and places."""
        return self._constant("gaqat.integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        from onnx.numpy_helper import from_array

        self.constants.setdefault(name, from_array(value, name))
        return name
