"""A module whose forward leaves out the normalization that a layer contains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..quant.graph.forward_graph import forward_graph, remove_shape_checks
from ..quant.graph.norm import Norm, is_constant

_REGISTRIES = ("_parameters", "_buffers", "_modules")


class ForwardWithoutNorm(nn.Module):
    """Computes in evaluation mode what ``module`` does, without the calls at some positions of its forward.

    It has the children, hooks and plain attributes of ``module``, and of the tensors those that are still read.

    Args:
        module: a module whose forward can be traced symbolically.
        positions: which calls of functions and methods in its forward only pass on the value that they normalize.
    """

    _function: Callable[..., Any]

    def __init__(self, module: nn.Module, positions: Iterable[int]) -> None:
        super().__init__()
        graph = forward_graph(module)
        if graph is None:
            raise ValueError(f"the forward of {type(module).__name__} cannot be traced")
        calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
        self.positions = tuple(positions)
        for position in self.positions:
            call = calls[position]
            call.replace_all_uses_with(next(node for node in call.all_input_nodes if not is_constant(node)))
            graph.erase_node(call)
        remove_shape_checks(graph)
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        attributes = {name: value for name, value in vars(module).items() if name not in _REGISTRIES}
        vars(self).update(attributes, positions=self.positions)
        self._modules = module._modules.copy()
        self._parameters = {name: tensor for name, tensor in module._parameters.items() if name in read}
        self._buffers = {name: tensor for name, tensor in module._buffers.items() if name in read}
        self.kind, self.graph = type(module).__name__, graph
        self._compile()

    @property
    def is_identity(self) -> bool:
        """Whether nothing is left of the forward."""
        return [node.op for node in self.graph.nodes] == ["placeholder", "output"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"the forward of {self.kind} in evaluation mode, with its BatchNorm in the layer before"

    def _compile(self) -> None:
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)  # Generated from the graph, as in torch.fx.GraphModule.
        vars(self)["_function"] = namespace["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()


def without_norms(module: nn.Module, norms: Sequence[Norm]) -> nn.Module:
    """What is left of ``module`` when the ``norms`` in its forward are gone."""
    if not norms[0].steps:
        return nn.Identity()
    # Layers whose outputs are concatenated have parts of the same norm.
    rest = ForwardWithoutNorm(module, dict.fromkeys(position for norm in norms for position in norm.positions))
    return nn.Identity() if rest.is_identity else rest
