"""Print the gain of each recipe on a task, by the distance of the task from the experts' training tasks.

Usage: python examples/demo/distance.py RESULTS.json ...

The distance of two tasks is 1 minus the cosine between the mean embeddings of their prompts under
all-MiniLM-L6-v2. The distance of a task is the distance to its nearest training task. The last lines give
the rank correlation (Spearman) of distance and gain over all tasks that no expert was trained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from experthub.hub import Registry
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.readers.similarity import embed
from experthub.hub.registry.expert import Reference
from experthub.hub.session import Session
from experthub.hub.tasks.task_files import read_task
from torch import Tensor

ENCODER, EXAMPLES = "all-minilm-l6-v2", 64
EXPERTS = Path(__file__).with_name("experts.txt")


def trained_tasks(registry: Registry) -> list[str]:
    """List the tasks that the experts of the demo were trained on.

    Args:
        registry: The registry.

    Returns:
        The tasks.
    """
    names = EXPERTS.read_text().split()
    return [registry.find_expert(Reference.parse(name)).task or "" for name in names]


def centres(references: list[str], session: Session) -> dict[str, Tensor]:
    """Compute the mean embedding of the first prompts of every task.

    Args:
        references: The tasks.
        session: The session, whose registry knows the encoder.

    Returns:
        The mean embedding `[width]` of each task, scaled to length 1.
    """
    base = find(ENCODER, session)
    model, tokenizer = load_model(base, "float32", "cpu"), load_tokenizer(base)
    found = {}
    for reference in references:
        task = read_task(reference)
        prompts = [task.format_prompt(example) for example in task.split("all", EXAMPLES)]
        mean = embed(model, tokenizer, prompts).mean(0)
        found[reference] = mean / mean.norm()
    return found


def spearman(x: list[float], y: list[float]) -> float:
    """Compute the rank correlation of two lists. Equal values share the mean of their ranks.

    Args:
        x: The first list.
        y: The second list, of the same length.

    Returns:
        The correlation.
    """
    values = [torch.tensor(v)[:, None] for v in (x, y)]
    ranks = [(v > v.T).sum(1) + ((v == v.T).sum(1) - 1) / 2 for v in values]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main(files: list[str]) -> None:
    """Print the table and the correlations.

    Args:
        files: Results of `hub eval`.
    """
    session = Session()
    trained = trained_tasks(session.registry)
    rows: dict[str, Any] = {}
    for file in files:
        for row in json.loads(Path(file).read_text())["tasks"]:
            rows[row["task"]] = row["methods"]
    place = centres([*trained, *rows], session)
    near = {task: max(trained, key=lambda t: float(place[t] @ place[task])) for task in rows}
    distance = {task: max(0.0, 1 - float(place[near[task]] @ place[task])) for task in rows}
    methods = [name for name in next(iter(rows.values())) if name != "base"]
    print(f"| distance | task | nearest trained task | base | {' | '.join(methods)} |")
    print("| ---: | --- | --- | ---: |" + " ---: |" * len(methods))
    for task in sorted(rows, key=distance.__getitem__):
        gains = [f"{rows[task][m]['delta_to_base']['value']:+.3f}" for m in methods]
        nearest = "itself" if near[task] == task else f"`{near[task].partition(':')[2]}`"
        start = f"| {distance[task]:.2f} | `{task.partition(':')[2]}` | {nearest} "
        print(f"{start}| {rows[task]['base']['accuracy']:.3f} | {' | '.join(gains)} |")
    unseen = [task for task in rows if task not in trained]
    for method in methods if len(unseen) > 2 else ():
        gains_of = [rows[task][method]["delta_to_base"]["value"] for task in unseen]
        value = spearman([distance[task] for task in unseen], gains_of)
        print(f"rank correlation of distance and gain, {method}: {value:+.2f} (n {len(unseen)})")


if __name__ == "__main__":
    main(sys.argv[1:])
