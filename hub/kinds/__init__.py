"""Kinds of experts, one module each.

A kind is registered when its module is imported. A folder belongs to the first kind of which it has
a mark, so the order of the imports matters.
"""

# isort: off
from experthub.hub.kinds.footprint import BaseShapes, Footprint
from experthub.hub.kinds.kind import ExpertKind, kinds
from experthub.hub.kinds.stored_expert import StoredExpert
from experthub.hub.kinds import lora as lora
from experthub.hub.kinds import task_vector as task_vector
from experthub.hub.kinds import coefficients as coefficients
from experthub.hub.kinds import skills as skills
from experthub.hub.kinds import router as router
from experthub.hub.kinds import prompt as prompt
# isort: on

__all__ = ["BaseShapes", "ExpertKind", "Footprint", "StoredExpert", "kinds"]
