"""The record of a comparison between an expert and the library that it comes from."""

from __future__ import annotations

from typing import Annotated

from experthub.hub.files.yaml_files import Closed
from pydantic import Field


class Proof(Closed):
    """The result of a comparison with the library that an expert comes from.

    Args:
        against: The name and version of the library.
        max_difference: The largest difference of the outputs on a fixed input.
        dtype: The dtype in which both models ran.
    """

    against: str
    max_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    dtype: str
