"""Compositions of soft prompts and prefixes: loading, attaching to a frozen model, and writing.

Shapes: B rows, S tokens, E experts, N virtual tokens, H hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.forward_hooks import Watch
from experthub.hub.composition.prompt_length import select_prompt
from experthub.hub.composition.prompted_encoder import PromptedDecoder, PromptedEncoder
from experthub.hub.composition.prompted_forward import PromptedForward, VirtualTokens
from experthub.hub.composition.rows import Rows
from experthub.hub.composition.selection import Selection, TextReader, make_selection
from experthub.hub.composition.weights import Contents
from experthub.hub.composition.whole_prompts import read_whole_prompts, split_prompts
from experthub.hub.errors import UsageError, explain_errors
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import create_folder, write_json, write_text
from experthub.hub.files.path_checks import check_free
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG
from experthub.hub.formats.prompt import PROMPT, PROMPT_EMBEDDINGS
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.recipes.method import Method
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import PlannedExpert
from experthub.hub.session import Session
from experthub.hub.transfer.pull import pull
from experthub.merge import merges
from experthub.routing import State
from safetensors.torch import save_file
from torch import Tensor

Prompt = dict[str, Tensor]  # `prompt` `[N, H]`, or `keys` and `values` `[L, A, N, D]`.


@dataclass
class AttachedPrompts:
    """The functions that were put in place of those of a model.

    Args:
        merged: The tensors of a merge; None for a route.
        before: The modules whose `forward` was replaced, each with an earlier replacement or None.
        hooks: The handles of hooks.
    """

    merged: Prompt | None = None
    before: list[tuple[Any, Any]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def replace(self, module: Any, forward: Any) -> None:
        """Put a function in place of the `forward` of a module.

        Args:
            module: The module, which is changed in place.
            forward: The function.
        """
        self.before.append((module, vars(module).get("forward")))
        module.forward = forward

    def undo(self, model: Any) -> None:
        """Put the model's own functions back.

        Args:
            model: The composed model, which is changed in place.
        """
        split_prompts(model)
        for module, forward in self.before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        for hook in self.hooks:
            hook.remove()
        self.before.clear()
        self.hooks.clear()


def load_merged(plan: Plan, session: Session) -> Prompt:
    """Load the soft prompts of a merge as one.

    Args:
        plan: A plan with a merge of soft prompts.
        session: The store.

    Returns:
        The tensors of the result.

    Raises:
        IntegrityError: The content of an expert is damaged.
    """
    return _merge(plan.recipe.method, _load_all(plan, session))


def attach_prompts(
    model: Any, plan: Plan, state: Any, session: Session, watch: Watch
) -> AttachedPrompts:
    """Let a model read the soft prompts or prefixes of a plan before each text.

    Args:
        model: The base's model, which is changed in place; no weight changes.
        plan: A plan of soft prompts.
        state: The state of the plan's router; None for a merge.
        session: The store and the registry.
        watch: The name under which the tasks of rows are named.

    Returns:
        The changes, which can be undone.

    Raises:
        IntegrityError: The content of an expert is damaged.
    """
    merged = load_merged(plan, session) if plan.recipe.merge else None
    attached = AttachedPrompts(merged)
    if merged is not None and plan.base.peft_task_type != "CAUSAL_LM":
        encoder, decoder = model.get_encoder(), model.get_decoder()
        prompt_NH = merged["prompt"]
        attached.replace(encoder, PromptedEncoder(encoder.forward, model, prompt_NH))
        attached.replace(decoder, PromptedDecoder(decoder.forward, len(prompt_NH)))
        return attached
    inner = model.get_decoder()  # Some models with a head call it past their base model.
    if merged is not None:
        chosen = PromptChoice(1)
        virtual = _pad([merged])
    else:
        prompts = _load_all(plan, session)
        selection = make_selection(model, plan, state or State(), session)
        texts = None
        if plan.recipe.method.strategy.needs_own_tasks:
            texts = TextReader(load_tokenizer(plan.base))
        chosen = PromptChoice(len(prompts), selection, plan.recipe.method.method, watch.name, texts)
        nothing = {name: tensor[..., :0, :] for name, tensor in prompts[0].items()}
        virtual = _pad([*prompts, nothing])
    prompted = PromptedForward(inner.forward, model, virtual, chosen)
    attached.replace(inner, prompted)
    attached.hooks.append(model.register_forward_hook(prompted.check_called))
    read_whole_prompts(model)
    return attached


@dataclass(eq=False)
class PromptChoice:
    """A function that chooses the soft prompt of each row.

    Args:
        n_experts: The number of soft prompts E. The number E itself stands for none of them.
        select: The router; None chooses the only soft prompt.
        method: The name of the router, for errors.
        name: The name under which the tasks of rows are named.
        read_texts: A function that decodes the rows for the router.
    """

    n_experts: int
    select: Selection | None = None
    method: str = ""
    name: str = ""
    read_texts: TextReader | None = None

    def __call__(self, read: Tensor, real_BS: Tensor) -> Tensor:
        """Return the soft prompt `[B]` of each row.

        Args:
            read: The token ids `[B, S]`, or embeddings `[B, S, H]`.
            real_BS: A mask that is false for padding.

        Returns:
            The positions of the soft prompts.

        Raises:
            UsageError: The router mixes several soft prompts for a row.
        """
        rows = len(read)
        if self.select is None:
            return torch.zeros(rows, dtype=torch.long)
        real = select_prompt(real_BS, rows, read.shape[1], read.device)
        own = Rows(read, real_BS if real is None else real, self.name, self.read_texts)
        weights_BE = self.select(own).dense(self.n_experts).expand(rows, self.n_experts)
        chosen_BE = weights_BE > 0
        if bool(((weights_BE != 0) & (weights_BE != 1)).any() | (chosen_BE.sum(1) > 1).any()):
            raise UsageError(
                f"{self.method} mixes several soft prompts for a row, and a row can have one",
                f"set the options of {self.method} so that it chooses one expert or none, see "
                f"hub methods {self.method}; or use merge: to put them one behind the other",
            )
        none_B = ~chosen_BE.any(1)
        return torch.where(none_B, self.n_experts, chosen_BE.long().argmax(1))


def _load_all(plan: Plan, session: Session) -> list[Prompt]:
    """Load the soft prompt of each expert of a plan."""
    pull(session, *(member.content for member in plan.members))
    with Contents(plan.members, session.store, gates=False) as contents:
        return [_load(expert, contents) for expert in plan.experts]


def _load(expert: PlannedExpert, contents: Contents) -> Prompt:
    """Load the soft prompt of an expert, or of a nested merge."""
    found = []
    for member in expert.members:
        tensors = Tensors(contents[member.digest, PROMPT])
        names = ("keys", "values") if "keys" in tensors.header else ("prompt",)
        found.append({name: tensors[name].clone() for name in names})
    return found[0] if expert.merge is None else _merge(expert.merge, found)


def _merge(method: Method, prompts: Sequence[Prompt]) -> Prompt:
    """Merge soft prompts, tensor by tensor."""
    strategy, weights = merges[method.method], torch.ones(len(prompts))
    with explain_errors(method.method):
        return {
            name: strategy.call([_widen(one[name]) for one in prompts], weights, **method.options)
            for name in prompts[0]
        }


def _widen(tensor: Tensor) -> Tensor:
    """Convert a tensor of fewer bits to float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pad(prompts: Sequence[Prompt]) -> VirtualTokens:
    """Pad soft prompts in front to one number of tokens."""
    counts = [next(iter(one.values())).shape[-2] for one in prompts]
    most = max(counts)
    tensors = {
        name: torch.stack(
            [
                torch.nn.functional.pad(_widen(one[name]), (0, 0, most - count, 0))
                for one, count in zip(prompts, counts, strict=True)
            ]
        )
        for name in prompts[0]
    }
    place_N = torch.arange(most)
    return VirtualTokens(tensors, place_N >= most - torch.tensor(counts)[:, None])


def save_prompts(merged: Prompt | None, plan: Plan, folder: Path, format: str) -> Path:
    """Write a merge of soft prompts as one adapter of peft.

    Args:
        merged: The tensors of the merge; None for a route.
        plan: The plan.
        folder: A new or empty folder.
        format: `peft`.

    Returns:
        The folder.

    Raises:
        UsageError: The format is another one, or the plan has a route.
        ConflictError: The folder is in use.
    """
    if merged is None or format != "peft":
        raise UsageError(
            "soft prompts change no weights, so there is no merged model to write",
            "use --format peft (format='peft'), which writes one adapter with all soft prompts"
            if merged is not None
            else "use the recipe with hub generate, hub eval or hub.compose",
        )
    check_free(folder)
    with create_folder(folder) as draft:
        config, saved = _describe_peft(merged, plan)
        save_file({PROMPT_EMBEDDINGS: saved.contiguous()}, draft / ADAPTER)
        write_json(draft / ADAPTER_CONFIG, config)
        write_text(draft / "recipe.lock.yaml", yaml_files.dump(plan.lock))
    return folder


def _describe_peft(merged: Prompt, plan: Plan) -> tuple[dict[str, Any], Tensor]:
    """Return the configuration and the tensor by which peft saves a soft prompt or a prefix."""
    common = {
        "task_type": plan.base.peft_task_type,
        "base_model_name_or_path": plan.base.public_name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
    }
    if "prompt" in merged:
        tokens, width = merged["prompt"].shape
        own = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens, "token_dim": width}
        return common | own, merged["prompt"]
    layers, heads, tokens, width = merged["keys"].shape
    both = torch.stack([merged["keys"], merged["values"]], 1)
    own = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": tokens,
        "token_dim": heads * width,
        "num_attention_heads": heads,
        "num_layers": layers,
        "encoder_hidden_size": heads * width,
    }
    return common | own, both.permute(3, 0, 1, 2, 4).reshape(tokens, -1)
