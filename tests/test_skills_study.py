"""The table of the study of skills, from results that are made up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent.parent / "examples" / "skills"
COLUMNS = ["base", "mhr average", "lora all 16", "mhr z 16"]


def test_it_has_the_mean_over_tasks_and_seeds(tmp_path: Path) -> None:
    study = yaml.safe_load((FOLDER / "encoder.yaml").read_text())
    study |= {"shots": [16], "inventories": {"mhr": {}}}
    (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(study))
    for seed, right in enumerate((0.25, 0.75)):
        tasks = {
            task: {
                "n": 8,
                "accuracy": dict.fromkeys(COLUMNS, right + extra),
                "trainable": {"lora all 16": 1234567, "mhr z 16": None},
            }
            for task, extra in (("a", 0.0), ("b", 0.1))
        }
        result = {"schema": 1, "study": "encoder", "seed": seed, "tasks": tasks}
        (tmp_path / f"encoder-{seed}.json").write_text(json.dumps(result))
    head, *lines = runpy.run_path(str(FOLDER / "summary.py"))["lines"](tmp_path)
    assert "seeds 0, 1" in head and "(encoder)" in head
    assert "| zero-shot | 0.550 ± 0.354 | | |" in lines
    assert "| mhr average | 0.550 ± 0.354 | | |" in lines
    assert "| lora all | | 0.550 ± 0.354 | 1,234,567 |" in lines
    assert "| mhr z | | 0.550 ± 0.354 |  |" in lines
