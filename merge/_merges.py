"""The catalogue of merges, and the properties that only merges have."""

from __future__ import annotations

from dataclasses import dataclass

from experthub.merge._catalogue import Catalogue


@dataclass(frozen=True)
class MergeTraits:
    """The properties of a merge that its caller and the conformance suite must know.

    Args:
        order_dependent: Whether permuting the experts may change the result.
        whole_model: Whether one tensor of the result depends on all tensors of the experts.
        dense: Whether the result is dense even if all experts are low-rank.
        prompts: Whether the merge is a function of soft prompts, and not of task vectors.
    """

    order_dependent: bool = False
    whole_model: bool = False
    dense: bool = False
    prompts: bool = False


merges = Catalogue("merge", "experthub.merges", MergeTraits)
