"""Features of texts and inputs of modules, without choices and answers.

Shapes: N texts, T tokens, I inputs of a module, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.errors import UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.progress import Report, silent
from experthub.hub.readers.batching import read_all
from experthub.hub.readers.reader import Reader, find_pad_token, pad
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.similarity import MEAN, find_rule, pool
from experthub.hub.readers.text import TokenRow
from experthub.hub.readers.tokens import tokenise, tokenise_prompt
from experthub.hub.readers.window import Window
from experthub.hub.tasks.task import Example, Task
from torch import Tensor, nn


class Features:
    """A reader that returns features of texts instead of logits; its questions have no choices.

    The features are an encoder's pooled embedding, or a language model's last hidden state at the
    last token.
    """

    name = "features"

    def __init__(self, base: Base, report: Report = silent) -> None:
        """Create a reader.

        Args:
            base: A causal language model or a sentence encoder.
            report: A callback for a note about texts that are cut.

        Raises:
            UsageError: The base is of another kind.
        """
        config = read_json(base.folder / "config.json")
        if config.get("is_encoder_decoder") or not (base.is_causal or base.is_encoder):
            raise UsageError(
                f"{base.name} is a {base.architecture}, which does not compute features of texts",
                "use a language model or a sentence encoder",
            )
        self.causal, self.tokenizer = base.is_causal, load_tokenizer(base)
        self.window = Window.of(base, report=report)
        self.rule = MEAN if self.causal else find_rule(base)
        self.real: Tensor | None = None

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The prompt for a language model, or the input for an encoder, without choices.
        """
        return Question(format_text(task, example, self.causal), ())

    def texts(self, task: Task, limit: int) -> list[str]:
        """Return the texts of the first examples of a task's training split.

        Args:
            task: The task.
            limit: The largest number of examples.

        Returns:
            The texts.
        """
        return [self.question(task, example).text for example in task.split("train", limit)]

    def row(self, question: Question) -> TokenRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The token ids of the text.
        """
        read = tokenise_prompt if self.causal else tokenise
        return TokenRow(read(self.tokenizer, self.rule.prepare(question.text), self.window), ())

    def read(self, model: Any, rows: Sequence[TokenRow]) -> Tensor:
        """Compute the features of a batch.

        Args:
            model: The base, or a composition on it.
            rows: The prepared texts.

        Returns:
            The features `[N, D]`, float32.
        """
        device, token = next(model.parameters()).device, find_pad_token(model)
        ids_NT, self.real = pad([row.tokens for row in rows], device, token=token)
        batch = {"input_ids": ids_NT, "attention_mask": self.real.long()}
        if self.causal:
            hidden_NTD = model.base_model(**batch, use_cache=False).last_hidden_state
            last_N = self.real.sum(1) - 1
            found: Tensor = hidden_NTD[
                torch.arange(len(rows), device=last_N.device), last_N
            ].float()
        else:
            found = pool(model, batch, self.rule)
        self.real = None
        return found

    @torch.no_grad()
    def compute(self, model: Any, texts: Sequence[str]) -> Tensor:
        """Compute the features of any number of texts.

        Args:
            model: The base, or a composition on it.
            texts: The texts.

        Returns:
            The features `[N, D]`, float32.
        """
        return read_all(self, model, [self.row(Question(text, ())) for text in texts])


def format_text(task: Task, example: Example, causal: bool) -> str:
    """Format an example as the text that a base reads.

    Args:
        task: The task of the example.
        example: The example.
        causal: Whether the base is a causal language model.

    Returns:
        The prompt for a causal language model, or the input alone for another base.
    """
    return task.format_prompt(example) if causal else example.input


@contextmanager
def watch_inputs(
    modules: Mapping[str, nn.Module], reader: Reader, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Observe the inputs of modules while the block runs.

    Padding is removed, except from the keys and values of cross attention: they read the prompts
    while the mask is that of the answers.

    Args:
        modules: The modules by name.
        reader: The reader that the model reads with, which knows the padding.
        see: A function that is called with a module's name and its inputs `[T, I]` in float32.

    Yields:
        Nothing.
    """

    def watch(name: str) -> Any:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            if reader.real is not None and x.shape[:2] == reader.real.shape:
                x = x[reader.real]
            see(name, x.reshape(-1, x.shape[-1]))

        return before

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
