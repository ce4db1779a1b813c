"""All benchmarks of training, one after the other, each in its own process. `make gpu` is for GPUs.

python benchmarks/run.py [--parts fake_quantize step] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("fake_quantize", "step", "two_passes", "memory", "growth")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="write all tables here as well")
    options = parser.parse_args()
    results = {}
    environment = {**os.environ, "KINETO_LOG_LEVEL": "99"}  # silences the profiler
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            start, file = time.monotonic(), Path(folder) / "part.json"
            script = Path(__file__).with_name(f"{part}.py")
            subprocess.run([sys.executable, script, "--json", file], check=True, env=environment)
            print(f"({part}.py ran for {(time.monotonic() - start) / 60:.1f} min)", flush=True)
            results[part] = json.loads(file.read_text())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
