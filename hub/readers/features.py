"""What a base makes of texts: features, and the inputs of its modules; no choice and no answer.

Shapes: N texts, T tokens, I inputs of a module, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from experthub.hub.bases.base import Base, load_tokenizer
from experthub.hub.errors import UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.readers.reader import Reader, padded, read_all
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.similarity import MAX_TOKENS, pooled
from experthub.hub.readers.text import Text
from experthub.hub.tasks.task import Example, Task
from torch import Tensor, nn


class Features:
    """Texts to features: an encoder's pooled embedding, a language model's state of the last token.

    A reader whose questions have no choices.  Raises UsageError for a base of another kind.
    """

    name = "features"

    def __init__(self, base: Base) -> None:
        config = read_json(base.folder / "config.json")
        if config.get("is_encoder_decoder") or not (base.causal or base.encoder):
            raise UsageError(
                f"{base.name} is a {base.architecture}, and texts are read by its tokens",
                "use a language model or a sentence encoder",
            )
        self.causal, self.tokenizer = base.causal, load_tokenizer(base)
        self.real: Tensor | None = None

    def question(self, task: Task, example: Example) -> Question:
        return Question(task.prompt(example) if self.causal else example.input, ())

    def texts(self, task: Task, limit: int) -> list[str]:
        """What is read of the first examples of a task's training split."""
        return [self.question(task, example).text for example in task.split("train", limit)]

    def row(self, question: Question) -> Text:
        limit = {} if self.causal else {"truncation": True, "max_length": MAX_TOKENS}
        return Text(tuple(self.tokenizer(question.text, **limit)["input_ids"]), ())

    def read(self, model: Any, rows: Sequence[Text]) -> Tensor:
        """Features `[N, D]`, float32."""
        ids_NT, self.real = padded([row.tokens for row in rows], next(model.parameters()).device)
        batch = {"input_ids": ids_NT, "attention_mask": self.real.long()}
        if self.causal:
            hidden_NTD = model.base_model(**batch, use_cache=False).last_hidden_state
            last_N = self.real.sum(1) - 1
            found: Tensor = hidden_NTD[
                torch.arange(len(rows), device=last_N.device), last_N
            ].float()
        else:
            found = pooled(model, batch)
        self.real = None
        return found

    @torch.no_grad()
    def of(self, model: Any, texts: Sequence[str]) -> Tensor:
        """The features `[N, D]` of any number of texts."""
        return read_all(self, model, [self.row(Question(text, ())) for text in texts])


@contextmanager
def watched(
    modules: Mapping[str, nn.Module], reader: Reader, seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While the block lasts, hand over every module's inputs `[T, I]` at the tokens that are real.

    reader: by which the model reads.  seen: is called with the module's name and its inputs.
    """

    def watch(name: str) -> Any:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            if reader.real is not None and x.shape[:2] == reader.real.shape:
                x = x[reader.real]
            seen(name, x.reshape(-1, x.shape[-1]))

        return before

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
