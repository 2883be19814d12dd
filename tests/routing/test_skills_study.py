"""The table of the study of skills, from results that are made up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "skills"
COLUMNS = ["base", "mhr average", "lora all 16", "mhr z 16"]


def test_it_has_the_mean_over_tasks_and_seeds(tmp_path: Path) -> None:
    study = yaml.safe_load((FOLDER / "encoder.yaml").read_text())
    study |= {"shots": [16], "inventories": {"mhr": {}}, "compared": [["mhr z", "lora all"]]}
    (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(study))
    for seed, right in enumerate(("1000", "1110")):
        rows = {**dict.fromkeys(COLUMNS, right), "mhr z 16": "1111"}
        trainable = {"lora all 16": 1234567, "mhr z 16": None}
        tasks = {task: {"right": rows, "trainable": trainable} for task in ("a", "b")}
        result = {"schema": 1, "study": "encoder", "seed": seed, "tasks": tasks}
        (tmp_path / f"encoder-{seed}.json").write_text(json.dumps(result))
    head, *lines = runpy.run_path(str(FOLDER / "summary.py"))["lines"](tmp_path)
    assert "seeds 0, 1" in head and "(encoder)" in head
    assert "| zero-shot | 0.500 ± 0.354 | | |" in lines
    assert "| mhr average | 0.500 ± 0.354 | | |" in lines
    assert "| lora all | | 0.500 ± 0.354 | 1,234,567 |" in lines
    assert "| mhr z | | 1.000 ± 0.000 |  |" in lines
    # Of each task's examples, the seeds' mean: 0, .5, .5 and 1 more of them are right.
    (compared,) = (line for line in lines if line.startswith("| mhr z - lora all | +0.500 ("))
    low, high = map(float, compared.split("(")[1].split(")")[0].split(".."))
    assert 0 < low < 0.5 < high < 1
