"""Run lm-evaluation-harness for the benchmarks. `_peer.Peer` starts this script with its own interpreter.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.utils import logging as transformers_logging

PACKAGES = ("torch", "transformers", "lm_eval")


class Recorded(HFLM):
    """The model class of lm-evaluation-harness, which keeps the last requests and their token ids."""

    requests: list[Instance]
    ids: dict[tuple[str, str], tuple[list[int], list[int]]]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Score the requests, and keep them.

        Args:
            requests: The requests of one task.
            disable_tqdm: This argument is ignored; there is never a progress bar.

        Returns:
            The log-likelihoods.
        """
        self.requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        self.ids = {texts: (context, choice) for texts, context, choice in requests}
        return super()._loglikelihood_tokens(requests, *arguments, **options)


class Side:
    """The state between commands: the model, and the requests of every task scored so far.

    Args:
        folder: The folder of the model.
    """

    def __init__(self, folder: str) -> None:
        self.model = Recorded(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
        self.manager = TaskManager(include_defaults=False)
        self.requests: dict[str, list[Instance]] = {}

    def do(self, command: str) -> Any:
        """Answer one command.

        Args:
            command: `versions`, or a JSON list of `score` or `seconds` and its arguments.

        Returns:
            The answer, which can be written as JSON.
        """
        if command == "versions":
            return {name: version(name) for name in PACKAGES}
        word, *arguments = json.loads(command)
        return self.score(*arguments) if word == "score" else self.seconds(*arguments)

    def score(self, name: str, file: str) -> list[dict[str, Any]]:
        """Evaluate the task in a JSON Lines file.

        Args:
            name: The name of the task.
            file: The path of the file.

        Returns:
            The texts, the token ids, the sums of log-probabilities and the accuracy of each example.

        Raises:
            RuntimeError: If lm-evaluation-harness returns no result.
        """
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": file}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc"}],
        }
        self.model.batch_size_per_gpu = 8
        found = evaluate(self.model, self.manager.load([task]), bootstrap_iters=0)
        self.requests[name] = self.model.requests
        if found is None:
            raise RuntimeError("lm-eval returned no result")
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        return [
            {
                "texts": sample["arguments"],
                "ids": [self.model.ids[texts] for texts in sample["arguments"]],
                "sums": [logprob for logprob, _ in sample["filtered_resps"]],
                "acc": sample["acc"],
            }
            for sample in samples
        ]

    def seconds(self, name: str, batch: int, examples: int) -> float:
        """Time the log-likelihoods of the first examples of a scored task, including tokenising.

        Args:
            name: The name of the task.
            batch: The batch size.
            examples: The number of examples.

        Returns:
            The time in seconds.
        """
        self.model.batch_size_per_gpu = batch
        requests = [request for request in self.requests[name] if request.doc_id < examples]
        gc.collect()
        start = time.perf_counter()
        self.model.loglikelihood(requests)
        return time.perf_counter() - start


def main() -> None:
    """Answer commands until stdin ends. Only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    threads, folder = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(folder)
    for line in sys.stdin:
        print(json.dumps(side.do(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
