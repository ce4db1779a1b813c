"""A user's program. `wheel_smoke.py` runs it where only the wheel and its core dependencies are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path


def main() -> None:
    import torch
    from torch import nn

    import gaqat_optim
    from gaqat_optim import (
        GAQATOptimizer,
        QuantConfig,
        export_onnx,
        load_packed,
        plot_conflict,
        quantize_model,
        save_packed,
    )

    assert Path(gaqat_optim.__file__).is_relative_to(sys.prefix), f"not the wheel's package: {gaqat_optim.__file__}"
    version = importlib.metadata.version("gaqat-optim")
    assert version == gaqat_optim.__version__, f"the wheel is {version}, its __version__ {gaqat_optim.__version__}"
    for name in ("onnx", "onnxscript", "onnxruntime", "safetensors", "matplotlib", "pytest"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed: this environment is not clean"

    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    loss_fn = nn.CrossEntropyLoss()

    model = quantize_model(model, QuantConfig(weight_bits=4, activation_bits=4), calibration=x)
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=3e-3), model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0], f"the loss did not fall: {losses[0]} to {losses[-1]}"

    file = Path("network.onnx")
    message = missing_extra(lambda: export_onnx(model, x, file))
    assert 'pip install "gaqat-optim[onnx]"' in message, message
    assert not file.exists(), "export_onnx left a file behind"
    for call in (save_packed, load_packed):
        message = missing_extra(lambda call=call: call(model, file))
        assert 'pip install "gaqat-optim[packed]"' in message, message
    assert not file.exists(), "save_packed left a file behind"
    message = missing_extra(lambda: plot_conflict(optimizer))
    assert 'pip install "gaqat-optim[plot]"' in message, message

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, gaqat-optim {version}"
    print(
        f"{versions}: trained with the wheel alone: loss {losses[0]:.3f} to {losses[-1]:.3f}; missing extras are named"
    )


def missing_extra(call) -> str:
    try:
        call()
    except ImportError as error:
        return str(error)
    raise AssertionError("a call that needs a missing extra did not raise ImportError")


if __name__ == "__main__":
    main()
