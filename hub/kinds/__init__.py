"""Kinds of experts, one file each.

A kind is registered when its module is imported. A folder is recognised as the first kind of which
it has a file, so the order of the imports counts.
"""

# isort: off
from experthub.hub.kinds.kind import BaseShapes, ExpertKind, Footprint, StoredExpert, kinds
from experthub.hub.kinds import lora as lora
from experthub.hub.kinds import task_vector as task_vector
from experthub.hub.kinds import coefficients as coefficients
from experthub.hub.kinds import skills as skills
from experthub.hub.kinds import router as router
# isort: on

__all__ = ["BaseShapes", "ExpertKind", "Footprint", "StoredExpert", "kinds"]
