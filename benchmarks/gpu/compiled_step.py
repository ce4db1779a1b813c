"""The steps of ``gpu.network_step`` with compiled networks: ResNet-50 in bf16 alone, the others with ``--full``."""

from __future__ import annotations

from functools import partial

from gpu.network_step import cases
from gpu.rows import part_command

if __name__ == "__main__":
    part_command(partial(cases, is_compiled=True))
