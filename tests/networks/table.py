"""The results of the sweep as a table: by network in the terminal, by family in `docs/networks.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from networks.outcomes import CONVERSION_ERROR, REFUSED, problems
from networks.registry import Network

PAGE = Path(__file__).resolve().parents[2] / "docs" / "networks.md"
BEGIN, END = "<!-- begin: table of families, from make sweep -->\n", "<!-- end: table of families -->\n"

Record = Mapping[str, Any]


def by_network(records: Iterable[Record]) -> str:
    """One line a network: shares, BatchNorms left, difference of `convert`, integer kernels, and what is wrong."""
    headers = (
        "network",
        "weights",
        "MACs",
        "layers' MACs",
        "left out",
        "norms",
        "convert",
        "integer",
        "flips",
        "s",
        "",
    )
    rows = []
    for record in records:
        figures = record["figures"]
        norms = [str(figures[key]) for key in NORMS if key in figures]
        rows.append(
            (
                record["name"],
                *(_percent(figures.get(key)) for key in ("weight_share", "mac_share", "layer_mac_share")),
                ", ".join(figures.get("left_out", ())),
                "/".join(norms),
                *(_number(figures.get(key)) for key in ("conversion_error", "integer_share", "code_flip_rate")),
                f"{sum(record['seconds'].values()):.0f}",
                _shortened("; ".join([*problems(record), *(f"{e['check']} refused" for e in _refused(record))])),
            )
        )
    return tabulate(rows, headers=headers, disable_numparse=True)


NORMS = ("norms_foldable", "norms_shared", "norms_elsewhere")


def by_family(records: Mapping[str, Record], networks: Iterable[Network]) -> str:
    """A Markdown table with a line for each family of ``networks``; those without a record count for nothing."""
    families: dict[str, list[str]] = {}
    for network in networks:
        families.setdefault(network.family, []).append(network.name)
    headers = (
        "family",
        "networks",
        "MACs of layers quantized: least, median",
        "left out by name",
        "BatchNorms left behind a layer",
        "`convert` equals training",
        "products on integer kernels: least, median",
        "ONNX file runs",
    )
    rows = []
    for family, names in families.items():
        listed = ", ".join(name.partition("/")[2] for name in names)
        rows.append((family, listed, *_cells([records[name] for name in names if name in records])))
    # Without tabulate's padding, which would change every line for one long cell.
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ["---"] * len(headers), *rows))


def _cells(records: list[Record]) -> Iterable[str]:
    if not records:  # nothing is not the same as 0
        yield from [""] * 6
        return
    figures = [record["figures"] for record in records]
    yield _least_and_median([f["layer_mac_share"] for f in figures if "layer_mac_share" in f])
    yield "; ".join(
        f"{record['name'].partition('/')[2]}: {', '.join(record['figures']['left_out'])}"
        for record in records
        if record["figures"].get("left_out")
    )
    counts = [sum(f.get(key, 0) for f in figures) for key in NORMS]
    yield str(counts[0]) + (f", and {counts[1]} with other readers of the layer" if counts[1] else "")
    equal = [f["conversion_error"] <= CONVERSION_ERROR for f in figures if "conversion_error" in f]
    yield f"{sum(equal)} of {len(records)}"
    exported = [record["figures"] for record in records if record["figures"].get("exported")]
    yield _least_and_median([f.get("integer_share") for f in exported])
    yield f"{sum('code_flip_rate' in f for f in exported)} of {len(exported)}" if exported else ""


def write_page(records: Mapping[str, Record], networks: Iterable[Network], page: Path = PAGE) -> None:
    """Replace the table between the two markers of the page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{by_family(records, networks)}\n\n{END}{after}", encoding="utf-8")


def networks_of_page(page: Path = PAGE) -> dict[str, list[str]]:
    """The names in the table of the page, by family."""
    text = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    return {row[0]: row[1].split(", ") for row in rows}


def _refused(record: Record) -> list[Mapping[str, str]]:
    return [error for error in record["errors"] if error["kind"] == REFUSED]


def _least_and_median(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{_percent(min(known))}, {_percent(median(known))}" if known else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."
