"""The HTML page of a trace; it is one file that loads no other resources."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.files.digests import encode_json
from experthub.hub.tracing.trace import Trace
from torch import Tensor

TEMPLATE = Path(__file__).with_name("page.html")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DIGIT_PAIRS = [high + low for high in DIGITS for low in DIGITS]
THOUSAND = 1000  # weights are written as thousandths


def render_page(trace: Trace) -> str:
    """Render a trace as HTML: tokens coloured by expert, experts by layer, and entropies.

    Weights are rounded to three digits, clamped to the range from 0 to 4.095, and omitted if they
    are 0. At most 4096 experts are shown, the first ones of the recipe.

    Args:
        trace: The trace.

    Returns:
        The page.
    """
    data = trace.summarise()
    data["tokens"] = [[t.text, t.id, t.prompt, t.written] for t in trace.tokens]
    data["modules"] = [[m.name, m.layer] for m in trace.modules]
    data["weights"] = [pack_weights(weights_TE) for weights_TE in trace.weights_MTE]
    # Without any "<", the data cannot close the script element that holds it.
    text = encode_json(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__TRACE__", text, 1)


def pack_weights(weights_TE: Tensor) -> str:
    """Pack the weights of one module into text.

    Every weight that is not zero takes four characters: two for the expert, and two for the weight
    in thousandths. Commas separate the rows, and a row that equals the row before it is `=`.

    Args:
        weights_TE: The weights, a row per token and a column per expert.

    Returns:
        The packed weights.
    """
    thousandths = (
        (weights_TE[:, : len(DIGIT_PAIRS)] * THOUSAND).round().clamp(0, len(DIGIT_PAIRS) - 1).int()
    )
    rows: list[str] = []
    before = None
    for row in thousandths.tolist():
        rows.append(
            "="
            if row == before
            else "".join(DIGIT_PAIRS[e] + DIGIT_PAIRS[w] for e, w in enumerate(row) if w)
        )
        before = row
    return ",".join(rows)
