"""The sweep over other people's networks, each in a process of its own: `make sweep`.

    python -m networks.sweep --only "timm/*" --out runs/networks.jsonl

Every network adds one line of JSON to the file. A network that is in the file already is skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from networks.checks import CHECKS, run_checks
from networks.outcomes import problems
from networks.registry import Network, chosen
from networks.table import by_network, write_page

# By the first part of a network's name; of transformers a class, without which hardly anything is imported.
_LIBRARIES = {"timm": "timm", "smp": "segmentation_models_pytorch", "transformers": "transformers:GPT2LMHeadModel"}


def main() -> bool:
    """Run the sweep; whether something is wrong."""
    parser = argparse.ArgumentParser(description="Networks of timm, torchvision, transformers and others, checked.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names or families, * allowed")
    parser.add_argument("--out", type=Path, default=Path("runs/networks.jsonl"), help="one line of JSON a network")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="by default all")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of processor time for one network")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="limit for one network")
    parser.add_argument("--again", action="store_true", help="run those in the file as well")
    parser.add_argument("--page", action="store_true", help="write the table of docs/networks.md from the results")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = set() if options.again else {record["name"] for record in read(options.out)}
    networks = [network for network in chosen(options.only) if network.name not in done]
    import_libraries(networks)
    begin = time.perf_counter()
    for number, network in enumerate(networks, 1):
        record = in_process(network, options.checks, options.seconds, options.gigabytes)
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        errors = ", ".join(f"{error['check']}: {error['kind']}" for error in record["errors"]) or "fine"
        seconds = sum(record["seconds"].values())
        print(f"[{number}/{len(networks)}] {network.name} {seconds:.1f} s: {errors}", flush=True)
    records = {record["name"]: record for record in read(options.out)}
    ordered = [records[network.name] for network in chosen(options.only) if network.name in records]
    print(f"\n{by_network(ordered)}\n{len(networks)} networks in {time.perf_counter() - begin:.0f} s")
    wrong = [record["name"] for record in ordered if problems(record)]
    print(f"with problems: {', '.join(wrong) or 'none'}")
    if options.page:
        write_page(records, chosen([]))
    return bool(wrong)


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a file, the last one of each network."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({record["name"]: record for record in records}.values())


def import_libraries(networks: Iterable[Network]) -> None:
    """Once, for all processes: they are copies of this one."""
    from torchvision_import import import_torchvision

    import_torchvision()
    for library in {network.name.partition("/")[0] for network in networks} & _LIBRARIES.keys():
        pkgutil.resolve_name(_LIBRARIES[library])


def in_process(network: Network, checks: list[str], seconds: float, gigabytes: float) -> dict[str, Any]:
    """The record of a network from a process that may crash, hang or take too much time or memory.

    The limit is of processor time. On a busy machine, ten times as much may pass.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(network, checks, seconds, gigabytes, sender))
    process.start()
    sender.close()
    record: dict[str, Any] = {
        "name": network.name,
        "family": network.family,
        "figures": {},
        "errors": [],
        "told": {},
        "seconds": {},
    }
    deadline = time.monotonic() + 10 * seconds
    problem = None
    while problem is None:
        if not receiver.poll(max(deadline - time.monotonic(), 0.0)):
            problem = f"not done after {10 * seconds:.0f} s"
            process.kill()
        else:
            try:
                message = receiver.recv()
            except EOFError:
                process.join()
                is_time = process.exitcode == -signal.SIGXCPU
                problem = f"more than {seconds:.0f} s of processor time" if is_time else "the process ended"
            else:
                if message is None:
                    break
                record = message
    process.join()
    if problem is not None:
        check = next((name for name in checks if name not in record["seconds"]), "build")
        text = f"{problem}, exit code {process.exitcode}"
        record["errors"].append({"check": check, "kind": "obscure", "type": "crash", "text": text, "where": ""})
    return record


def _child(network: Network, checks: list[str], seconds: float, gigabytes: float, sender: Any) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
    torch.set_num_threads(1)
    if not os.environ.get("SWEEP_OUTPUT"):  # What libraries print.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.dup2(null, sys.stderr.fileno())
    run_checks(network, checks, sender.send)
    sender.send(None)


if __name__ == "__main__":
    sys.exit(main())
