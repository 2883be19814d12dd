"""Chat templates, which are programs of strangers: they run in a process with limits.

The sandbox of jinja2 keeps a template from files and sockets, but not from loops and memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError, IntegrityError

RENDER_SECONDS = (
    5  # Processor time of the rendering; a usual template takes a thousandth of a second.
)
MAX_MEMORY = 2 << 30  # bytes of the process
MAX_TEXT = 1 << 20  # characters of the result
STARTING_SECONDS = 120  # The time of the whole process, most of which is the import.
PROGRAM = """
import json, resource, sys
from contextlib import suppress
from transformers.utils.chat_template_utils import render_jinja_template
given = json.load(sys.stdin)
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = int(used.ru_utime + used.ru_stime) + 1 + given["seconds"]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
with suppress(ValueError, OSError):  # Not every system can limit the memory.
    resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
try:
    text = render_jinja_template(**given["arguments"])[0][0]
    found = {"text": text} if len(text) <= given["characters"] else {"long": len(text)}
except MemoryError:
    found = {"memory": True}
except Exception as error:
    found = {"error": f"{type(error).__name__}: {error}"[:300]}
json.dump(found, sys.stdout)
"""


def render_chat(base: Base, tokenizer: Any, prompt: str) -> str:
    """Put a prompt into the chat template of a tokenizer, as `apply_chat_template` does.

    Args:
        base: The base, for errors.
        tokenizer: Its tokenizer, which has a chat template.
        prompt: The message of a user.

    Returns:
        The text, with the start of the answer.

    Raises:
        IntegrityError: The template exceeds the limits of time, memory or length.
        HubError: The template is damaged, or refuses the message.
    """
    hint = f"remove --chat, or correct the chat template in {base.folder}"
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise HubError(f"base {base.name}: {str(error).splitlines()[0][:300]}", hint) from None
    arguments = {
        **tokenizer.special_tokens_map,
        "conversations": [[{"role": "user", "content": prompt}]],
        "chat_template": template,
        "add_generation_prompt": True,
    }
    limits = {"seconds": RENDER_SECONDS, "memory": MAX_MEMORY, "characters": MAX_TEXT}
    found = _run(json.dumps(limits | {"arguments": arguments}, default=str))
    if "text" in found:
        return str(found["text"])
    if "error" in found:
        raise HubError(
            f"base {base.name}: its chat template cannot be used: {' '.join(found['error'].split())}",
            hint,
        )
    raise IntegrityError(
        f"base {base.name}: its chat template needs more than {RENDER_SECONDS} s, "
        f"{MAX_MEMORY >> 20} MiB or {MAX_TEXT} characters",
        hint,
    )


def _run(given: str) -> dict[str, Any]:
    """Run the program; return its result, or an empty mapping if the system stopped it."""
    secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in secret}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM],
            input=given,
            capture_output=True,
            text=True,
            timeout=STARTING_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode > 0:
        reason = (done.stderr.strip().splitlines() or ["unknown"])[-1]
        return {"error": f"the process that renders it failed: {reason[:300]}"}
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found
