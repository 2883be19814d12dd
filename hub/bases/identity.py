"""The digest of a base, which covers everything that changes what the base computes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from experthub.hub.files.digests import canonical_json, digest_of, sha256_of
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.embedding_rule import read_embedding_rule
from experthub.hub.formats.model_files import READ_BY_TRANSFORMERS, TEMPLATES

SCHEMA = 2  # Schema 1 is the fingerprint alone, which covers the weights.
CONFIGS = ("config.json", "generation_config.json")
# These keys say who wrote a configuration, and where it lay; see `_list_records`.
RECORDS = ("transformers_version", "_name_or_path")


def compute_base_digest(folder: Path, fingerprint: str) -> str:
    """Compute the digest of a base in a folder.

    It is the digest of `{"schema": 2, "fingerprint": ..., "files": {name: sha256}}`. The files are
    the configurations, and those of the tokenizer, the chat templates and the processors that are
    present. A configuration is hashed as canonical JSON without the keys in `RECORDS`, so that
    saving a base again does not change its digest. The rule of a sentence encoder is added as
    `embedding`, unless it is the plain one.

    Args:
        folder: The model folder.
        fingerprint: The fingerprint of its weights, see `compute_fingerprint`.

    Returns:
        The digest, `sha256:` and 64 hexadecimal digits.

    Raises:
        IntegrityError: A configuration is damaged.
    """
    records = _list_records(folder)
    files = {n: _hash_config(folder / n, records) for n in CONFIGS if (folder / n).is_file()}
    extra = sorted(folder.glob(f"{TEMPLATES}/*.jinja"))
    paths = [*(folder / name for name in READ_BY_TRANSFORMERS), *extra]
    files |= {p.relative_to(folder).as_posix(): sha256_of(p) for p in paths if p.is_file()}
    rule = read_embedding_rule(folder)
    own = {} if rule.is_plain else {"embedding": rule.describe()}
    return digest_of({"schema": SCHEMA, "fingerprint": fingerprint, "files": files} | own)


def _list_records(folder: Path) -> tuple[str, ...]:
    """List the keys of configurations that change no result.

    With `fix_mistral_regex`, transformers changes the tokenizer of older models, by their version.
    """
    path = folder / "tokenizer_config.json"
    by_version = path.is_file() and read_json(path).get("fix_mistral_regex")
    return tuple(key for key in RECORDS if not (by_version and key == "transformers_version"))


def _hash_config(path: Path, records: tuple[str, ...]) -> str:
    """Hash a configuration by its values, without the keys that only record something."""
    return hashlib.sha256(canonical_json(_remove_records(read_json(path), records))).hexdigest()


def _remove_records(value: Any, records: tuple[str, ...]) -> Any:
    """Remove keys, also from nested configurations."""
    if isinstance(value, dict):
        return {k: _remove_records(v, records) for k, v in value.items() if k not in records}
    return [_remove_records(v, records) for v in value] if isinstance(value, list) else value
