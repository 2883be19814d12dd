"""The rule by which a sentence encoder makes an embedding, as sentence-transformers stores it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experthub.hub.files.json_files import read_json, read_json_list
from experthub.hub.formats.model_files import DIGESTS, MODULES

# The configuration of the transformer has one of these names.
SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
PROMPTS = "config_sentence_transformers.json"
LIBRARY = "sentence_transformers."
# The older names of the ways to pool, in the order in which their results are concatenated.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
NEUTRAL = ("Normalize", "Dropout")  # Parts that do not change the direction of an embedding.
EARLIER_LIMIT = 256  # The number of tokens at which earlier versions cut every text.


@dataclass(frozen=True)
class EmbeddingRule:
    """The way from a text to its embedding; the default is that of an encoder that states none.

    Args:
        modes: The ways to pool the last hidden states, whose results are concatenated.
        prompt: A text that is put in front of every text.
        lower: Whether texts are read in lower case.
        tokens: The largest number of tokens of a text; None if the files state none.
        unknown: What the rule has beyond these parts; an empty text if it has nothing.
        missing: The file of the rule that the folder lacks; an empty text if it has all.
    """

    modes: tuple[str, ...] = ("mean",)
    prompt: str = ""
    lower: bool = False
    tokens: int | None = None
    unknown: str = ""
    missing: str = ""

    def prepare(self, text: str) -> str:
        """Put the prompt in front of a text, and write it in lower case if the rule asks for that.

        Args:
            text: The text.

        Returns:
            The text that is tokenised.
        """
        whole = self.prompt + text
        return whole.lower() if self.lower else whole

    @property
    def is_plain(self) -> bool:
        """True if embeddings are the same as those of an encoder that states no rule.

        A base keeps the digest that earlier versions gave it if its limit is the one that they had.
        """
        limit = None if self.tokens == EARLIER_LIMIT else self.tokens
        return replace(self, tokens=limit) == EmbeddingRule()

    def describe(self) -> dict[str, Any]:
        """Describe the rule for digests.

        Returns:
            Its values by name.
        """
        return asdict(self)


def read_embedding_rule(folder: Path) -> EmbeddingRule:
    """Read the rule of an encoder.

    Args:
        folder: The model folder.

    Returns:
        The rule. Files other than the limit of tokens count only beside a `modules.json`.

    Raises:
        IntegrityError: A file is damaged.
    """
    own = next((folder / n for n in SENTENCE_CONFIGS if (folder / n).is_file()), None)
    stated = read_json(own) if own else {}
    limit = stated.get("max_seq_length")
    tokens = limit if type(limit) is int and limit > 0 else None
    if not (folder / MODULES).is_file():
        return EmbeddingRule(tokens=tokens)
    modes, excluding, unknown, missing = _read_modules(folder)
    prompt = _read_prompt(folder)
    task = stated.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        unknown = unknown or f"transformer_task {task!r}"
    if prompt is None:
        unknown = unknown or "a default_prompt_name that names no prompt"
    if prompt and excluding:
        unknown = unknown or "include_prompt: false"
    lower = bool(stated.get("do_lower_case"))
    return EmbeddingRule(modes, prompt or "", lower, tokens, unknown, missing)


def _read_modules(folder: Path) -> tuple[tuple[str, ...], bool, str, str]:
    """Read the ways to pool, whether they leave the prompt out, what is unknown and what is missing."""
    modules = read_json_list(folder / MODULES)
    kinds = [str(m.get("type")) if isinstance(m, dict) else "an unnamed module" for m in modules]
    names = [kind.rpartition(".")[2] if kind.startswith(LIBRARY) else kind for kind in kinds]
    for name, expected in zip(names, ("Transformer", "Pooling"), strict=False):
        if name != expected:
            return (), False, name, ""
    if len(names) < 2:
        return (), False, "no Pooling", ""
    others = [name for name in names[2:] if name not in NEUTRAL]
    modes, excluding, unknown, missing = _read_pooling(folder, str(modules[1].get("path")))
    return modes, excluding, others[0] if others else unknown, missing


def _read_pooling(folder: Path, part: str) -> tuple[tuple[str, ...], bool, str, str]:
    """Read the configuration of the pooling."""
    # Earlier versions unpacked only the top folder of a package.
    place = folder / part / "config.json"
    inside = part and ".." not in Path(part).parts and not Path(part).is_absolute()
    if not inside or not place.is_file():
        unpacked = (folder / DIGESTS).is_file()
        return EmbeddingRule.modes, False, "", "" if unpacked else f"{part}/config.json"
    config = read_json(place)
    stated = config.get("pooling_mode")
    if stated is None:
        stated = [mode for flag, mode in FLAGS.items() if config.get(flag)] or "mean"
    modes = tuple(map(str, stated if isinstance(stated, list) else [stated]))
    other = [mode for mode in modes if mode not in FLAGS.values()]
    unknown = f"pooling_mode {other[0]!r}" if other else "" if modes else "no pooling_mode"
    return modes, config.get("include_prompt") is False, unknown, ""


def _read_prompt(folder: Path) -> str | None:
    """Read the text that is put in front of every text; None if the files do not have it."""
    path = folder / PROMPTS
    config = read_json(path) if path.is_file() else {}
    name, known = config.get("default_prompt_name"), config.get("prompts")
    if name is None:
        return ""
    found = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
    return found if isinstance(found, str) else None
