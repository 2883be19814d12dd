"""A trace as one page that loads nothing from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from experthub.hub.tracing.trace import Trace
from torch import Tensor

TEMPLATE = Path(__file__).with_name("page.html")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
PAIRS = [high + low for high in DIGITS for low in DIGITS]
THOUSAND = 1000


def page(trace: Trace) -> str:
    """The trace as HTML: its tokens coloured by expert, experts by layer, entropies.

    Weights are rounded to three digits, and those that become zero left out; what is below 0 is
    shown as 0, what is above 4.095 as that.  Of more than 4096 experts, the first are shown.
    """
    data = trace.summary()
    data["tokens"] = [[t.text, t.id, t.prompt, t.written] for t in trace.tokens]
    data["modules"] = [[m.name, m.layer] for m in trace.modules]
    data["weights"] = [packed(weights_TE) for weights_TE in trace.weights_MTE]
    # Nothing in the data can end the script that holds it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__TRACE__", text, 1)


def packed(weights_TE: Tensor) -> str:
    """One module's weights: four letters for each that is not zero, its expert and thousandths.

    Rows end with a comma; one that equals the row before is `=`.
    """
    thousandths = (weights_TE[:, : len(PAIRS)] * THOUSAND).round().clamp(0, len(PAIRS) - 1).int()
    rows: list[str] = []
    before = None
    for row in thousandths.tolist():
        rows.append(
            "=" if row == before else "".join(PAIRS[e] + PAIRS[w] for e, w in enumerate(row) if w)
        )
        before = row
    return ",".join(rows)
