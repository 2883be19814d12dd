"""A random one-layer Llama as a GGUF file, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZE, INNER, WORDS = 32, 48, 260


def write_gguf(
    path: Path, kv_heads: int = 4, changes: dict[str, NDArray[np.float32]] | None = None
) -> Path:
    """Write the file, which transformers converts in a moment; add changes to its weights."""
    import gguf
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<s>", "</s>", "<pad>", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (WORDS, SIZE), "output_norm": (SIZE,), "output": (WORDS, SIZE)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        rows = 8 * kv_heads if name in ("attn_k", "attn_v") else SIZE
        shapes[f"blk.0.{name}"] = (rows, SIZE)
    shapes |= {"blk.0.attn_norm": (SIZE,), "blk.0.ffn_norm": (SIZE,)}
    shapes |= {"blk.0.ffn_gate": (INNER, SIZE), "blk.0.ffn_up": (INNER, SIZE)}
    shapes |= {"blk.0.ffn_down": (SIZE, INNER)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values + (changes or {}).get(name, np.float32(0)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf_lora(path: Path, kv_heads: int, alpha: float = 5.0) -> Path:
    """Write a LoRA of this model as llama.cpp stores it, with the rows of q and k as in the model."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    random = np.random.default_rng(1)
    shapes = {"attn_q": (SIZE, SIZE), "attn_k": (8 * kv_heads, SIZE), "ffn_down": (SIZE, INNER)}
    named = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for number, (name, (rows, columns)) in enumerate(named.items()):
        rank = 2 + number
        a, b = random.standard_normal((rank, columns)), random.standard_normal((rows, rank))
        writer.add_tensor(f"{name}.weight.lora_a", 0.5 * a.astype(np.float32))
        writer.add_tensor(f"{name}.weight.lora_b", 0.5 * b.astype(np.float32))
    a, b = random.standard_normal((WORDS, 3)), random.standard_normal((SIZE, 3))
    writer.add_tensor("token_embd.weight.lora_a", 0.5 * a.astype(np.float32))
    writer.add_tensor("token_embd.weight.lora_b", 0.5 * b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_changes(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read what llama.cpp adds to each weight: `alpha / r * b a`, transposed for embeddings."""
    import gguf

    file = gguf.GGUFReader(path)
    alpha = float(file.fields["adapter.lora.alpha"].contents())
    held = {str(t.name): np.array(t.data) for t in file.tensors}
    found = {}
    for name in (n.removesuffix(".weight.lora_a") for n in held if n.endswith("lora_a")):
        a, b = held[f"{name}.weight.lora_a"], held[f"{name}.weight.lora_b"]
        change = a @ b.T if name == "token_embd" else b @ a
        found[name] = (alpha / b.shape[1] * change).astype(np.float32)
    return found
