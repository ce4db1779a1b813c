"""The scripts of docs/figures draw every picture from the tables beside them, and measure what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cost_accuracy
import figure_style
import freezing
import interval
import loss_surface
import pictogram_sheet
from conflict import recorder_of, report_of
from domain_generalization import pictogram_drawings
from domain_generalization.study.runner import attempt, results
from gaqat_optim import QuantConfig, quantize_model
from tiny_study import job, tiny_study, write_tree

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {
    "conflict": "digits-conflict.png",
    "cost_accuracy": "cost-accuracy.svg",
    "freezing": "freezing.svg",
    "interval": "interval.svg",
    "latency": "latency.svg",
    "loss_surface": "loss-surface.png",
    "overview": "overview.svg",
    "scale_report": "scale-report.svg",
    "scale_training": "scale-training.svg",
    "size_accuracy": "size-accuracy.svg",
}
LIMIT = 150_000  # bytes of a picture


@pytest.mark.parametrize("script", PICTURES)
def test_a_script_draws_its_picture_from_its_table(script: str, tmp_path: Path) -> None:
    source = (ROOT / "docs" / "figures" / f"{script}.py").read_text(encoding="utf-8")
    assert f"docs/images/{PICTURES[script]}" in source
    command = source.partition("sys.exit(command(")[2].partition("))")[0]
    name, _, suffix = PICTURES[script].partition(".")
    assert command.startswith(f'"{name}"')
    module = importlib.import_module(script)
    table = script if (figure_style.DATA / f"{script}.csv").exists() else "conflict"
    suffix = f".{suffix}"
    assert figure_style.command(name, module.draw, table=table, suffix=suffix, argv=["--out", str(tmp_path)]) == 0
    picture = tmp_path / PICTURES[script]
    assert 5_000 < picture.stat().st_size < LIMIT
    committed = ROOT / "docs" / "images" / PICTURES[script]
    assert 5_000 < committed.stat().st_size < LIMIT


def test_the_contact_sheet_of_the_pictograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for style in pictogram_drawings.DOMAINS:
        for label in ("bird", "meal"):
            folder = tmp_path / "pictograms" / style / label
            folder.mkdir(parents=True)
            for name in ("1f413", "1f986"):
                Image.new("RGB", (pictogram_drawings.SIZE,) * 2, "red").save(folder / f"{name}.png")
    monkeypatch.setattr("sys.argv", ["pictogram_sheet.py", str(tmp_path / "pictograms"), "--out", str(tmp_path)])
    assert pictogram_sheet.main() == 0
    for folder in (tmp_path, figure_style.IMAGES):
        assert (folder / "pictograms.png").stat().st_size < LIMIT
        with Image.open(folder / "pictograms.png") as sheet:
            assert sheet.width == 700


@pytest.mark.parametrize("table", sorted(path.name for path in figure_style.DATA.glob("*.csv")))
def test_a_table_says_how_where_and_when_it_was_made(table: str) -> None:
    command, machine = (figure_style.DATA / table).read_text(encoding="utf-8").splitlines()[:2]
    script = command.split()[2]
    assert (ROOT / script).is_file()
    assert "--run" in command
    processor, versions, date = machine.removeprefix("# ").split("; ")
    assert "VNNI" in processor
    assert "torch" in versions
    assert len(date) == len("2026-11-28")


def test_a_script_without_its_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path)]
    assert figure_style.command("cost-accuracy", cost_accuracy.draw, cost_accuracy.run, argv=arguments) == 0
    assert "there is no cost_accuracy.csv yet" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_cost_and_accuracy_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tiny_study(write_tree(tmp_path / "images"), tmp_path / "cost")
    for method in ("lsq", "lsq-x3", "lsq+sagm"):
        assert attempt(study, job(method), set(), lambda job, line: None) == "done"
    records = {record["method"]: record for record in results(study.out)}

    arguments = ["--run", "--keep", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)]
    assert figure_style.command("cost-accuracy", cost_accuracy.draw, cost_accuracy.run, argv=arguments) == 0
    rows = figure_style.read_table(tmp_path / "cost_accuracy.csv")
    assert {row["method"] for row in rows} == records.keys()
    assert cost_accuracy.studies(rows) == [("digits", 3)]
    for row in rows:
        record = records[row["method"]]
        assert float(row["last_step_accuracy"]) == pytest.approx(record["last_step_accuracy"], rel=1e-5)
        cost = record["seconds"] / records["lsq"]["seconds"]
        assert cost_accuracy.cost(rows, row["method"]) == pytest.approx(cost, rel=1e-4)
    assert (tmp_path / "cost-accuracy.svg").stat().st_size > 5_000
    printed = capsys.readouterr().out
    for method, record in records.items():
        assert f"digits, 3 bits, {method}: 1 runs, {record['last_step_accuracy']:.1f} %" in printed


def test_costs_are_medians_and_differences_are_within_a_width(tmp_path: Path) -> None:
    def row(bits: int, seed: int, method: str, seconds: float, accuracy: float) -> dict[str, object]:
        accuracies = {"last_step_accuracy": accuracy, "held_out_accuracy": accuracy}
        cell = {"data": "digits", "bits": str(bits), "target": "sketch", "seed": seed, "method": method}
        return {**cell, "seconds": seconds, **accuracies}

    rows = [row(bits, seed, "lsq", 10.0 + seed, 50.0 + seed) for bits in (3, 4) for seed in range(3)]
    # Seed 2 was stopped for an hour.
    rows += [row(3, seed, "lsq-x3", 3 * (10.0 + seed) + 3600 * (seed == 2), 53.0 + seed) for seed in range(3)]
    rows += [row(3, seed, "lsq+sagm-flat", 32.0, 57.0 + 2 * seed) for seed in range(3)]
    assert cost_accuracy.cost(cost_accuracy.runs_of(rows, "digits", 3), "lsq-x3") == 3
    found = cost_accuracy.differences(cost_accuracy.runs_of(rows, "digits", 3), "last_step_accuracy")
    assert list(found["LSQ+SAGM, flat start - LSQ, 3x steps"].values()) == [4, 5, 6]
    assert cost_accuracy.differences(cost_accuracy.runs_of(rows, "digits", 4), "last_step_accuracy") == {}


def test_costs_without_lsq_have_no_unit(tmp_path: Path) -> None:
    record = {"target": "sketch", "seed": 0, "bits": 3, "method": "gaqat", "seconds": 2.0, "last_step_accuracy": 50.0}
    folder = tmp_path / "cost" / "jobs" / "sketch-seed0" / "gaqat-w3"
    folder.mkdir(parents=True)
    done = {"records": [{**record, "held_out_accuracy": 50.0}]}
    (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")
    with pytest.raises(ValueError, match="no row lsq at 3 bits"):
        cost_accuracy.run(tmp_path)


def test_intervals_are_compared_within_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = {(1, 160): {500: 50.0, 501: 40.0, 502: 45.0}, (5, 267): {500: 48.0, 501: 38.0, 502: 46.0, 503: 90.0}}
    for (every, steps), of_seed in accuracies.items():
        folder = tmp_path / f"interval{every}-{steps}"
        for seed, accuracy in of_seed.items():
            record = {"method": "lsq+sagm", "target": "sketch", "seed": seed, "bits": 3, "last_step_accuracy": accuracy}
            job_folder = folder / "jobs" / f"sketch-seed{seed}" / "lsq+sagm-w3"
            job_folder.mkdir(parents=True)
            done = {"records": [{**record, "held_out_accuracy": 50.0}]}
            (job_folder / "done.json").write_text(json.dumps(done), encoding="utf-8")
        settings = {"settings": {"interval": every, "steps": steps}}
        (folder / "study.json").write_text(json.dumps(settings), encoding="utf-8")

    arguments = ["--run", "--keep", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)]
    assert figure_style.command("interval", interval.draw, interval.run, argv=arguments) == 0
    rows = figure_style.read_table(tmp_path / "interval.csv")
    assert len(rows) == 7
    (difference,) = interval.differences(rows, "last_step_accuracy").values()
    assert difference == {("sketch", str(seed)): value for seed, value in ((500, -2.0), (501, -2.0), (502, 1.0))}
    line = next(line for line in capsys.readouterr().out.splitlines() if "interval=5, 267 steps" in line)
    assert "-1.00" in line
    assert "1 of 3" in line  # the cell that only one of them has is left out
    assert (tmp_path / "interval.svg").stat().st_size > 5_000


def test_freezing_is_compared_where_scales_move_and_where_they_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never, gaqat = {500: 50.0, 501: 40.0, 502: 60.0}, {500: 53.0, 501: 15.0, 502: 61.0}
    resting = {seed: accuracy + 2 for seed, accuracy in never.items()}
    of_row = {
        ("rest", "lsq+sagm"): never,
        ("rest", "gaqat"): resting,
        ("fraction", "gaqat"): gaqat,
        **{("move", method): never for method in ("lsq+sagm", "random", "both")},
        ("move", "smooth"): {500: 99.0},
    }
    for (folder, method), of_seed in of_row.items():
        for seed, accuracy in of_seed.items():
            job_folder = tmp_path / folder / "jobs" / f"sketch-seed{seed}" / f"{method}-w3"
            job_folder.mkdir(parents=True)
            record = {"method": method, "target": "sketch", "seed": seed, "bits": 3, "last_step_accuracy": accuracy}
            record |= {"held_out_accuracy": 50.0, "frozen": 0.25, "scale_change": 0.5}
            (job_folder / "done.json").write_text(json.dumps({"records": [record]}), encoding="utf-8")

    arguments = ["--run", "--keep", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)]
    assert figure_style.command("freezing", freezing.draw, freezing.run, argv=arguments) == 0
    rows = figure_style.read_table(tmp_path / "freezing.csv")
    assert len(rows) == 18
    found = freezing.differences(rows, "last_step_accuracy")
    cells = [("sketch", str(seed)) for seed in (500, 501, 502)]
    assert found["move: GAQAT - LSQ+SAGM"] == dict(zip(cells, (3.0, -25.0, 1.0), strict=True))
    assert found["interaction: move - rest"] == dict(zip(cells, (1.0, -27.0, -1.0), strict=True))
    assert found["move: GAQAT - random mask"] == found["move: GAQAT - LSQ+SAGM"]
    printed = capsys.readouterr().out
    assert not any("smooth" in label for label in found)  # a row that is not complete
    assert "move, smooth: left out, 1 runs of 3" in printed
    assert "move, gaqat: 3 runs, 43.0 %, 1 collapsed, frozen 0.250, |log(s_end / s_start)| 0.50" in printed
    assert (tmp_path / "freezing.svg").stat().st_size > 5_000


def test_a_direction_has_the_length_of_each_filter_and_no_other_parameter() -> None:
    model = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)))
    direction = loss_surface.filter_normalized(model, seed=1)
    assert set(direction) == {"0.weight", "3.weight"}
    for name, step in direction.items():
        lengths = model.get_parameter(name).flatten(1).norm(dim=1)
        torch.testing.assert_close(step.flatten(1).norm(dim=1), lengths)


def test_the_plane_of_losses_has_the_network_itself_in_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_surface, "POINTS", 3)
    images, labels = torch.randn(8, 6), torch.arange(8) % 2
    model = quantize_model(nn.Sequential(nn.Linear(6, 2)), QuantConfig(3, 3), calibration=images).eval()
    here = nn.functional.cross_entropy(model(images), labels).item()
    directions = [loss_surface.filter_normalized(model, seed) for seed in (1, 2)]
    plane = loss_surface.losses(model, directions, images, labels)
    assert len(plane) == 9
    assert plane[0.0, 0.0] == here
    assert len(set(plane.values())) > 3


def test_the_report_of_a_recorder_is_that_of_the_optimizer_then() -> None:
    rows = figure_style.read_table(figure_style.DATA / "conflict.csv")
    recorder = recorder_of(rows)
    report = {row["name"]: row for row in report_of(recorder, window=20)}
    committed = {row["name"]: row for row in figure_style.read_table(figure_style.DATA / "scale_report.csv")}
    assert report.items() <= committed.items()
    task = np.array(recorder.task)[119:140, 0]
    changes = np.mean(np.sign(task[1:]) != np.sign(task[:-1]))
    assert float(report[recorder.names[0]]["disorder_task"]) == pytest.approx(changes)
