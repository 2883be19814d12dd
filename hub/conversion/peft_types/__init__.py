"""The types of adapters of peft, besides a plain LoRA: one module for each family.

A type is registered when its module is imported.
"""

from experthub.hub.conversion.peft_types import householder as householder
from experthub.hub.conversion.peft_types import kronecker as kronecker
from experthub.hub.conversion.peft_types import lora_variants as lora_variants
from experthub.hub.conversion.peft_types import low_rank as low_rank
from experthub.hub.conversion.peft_types import norms as norms
from experthub.hub.conversion.peft_types import rotations as rotations
from experthub.hub.conversion.peft_types import scalings as scalings
from experthub.hub.conversion.peft_types import shared as shared
from experthub.hub.conversion.peft_types import spectral as spectral
from experthub.hub.conversion.peft_types.adapter_type import (
    AdaptedModule,
    AdapterType,
    adapter_types,
)

__all__ = ["AdaptedModule", "AdapterType", "adapter_types"]
