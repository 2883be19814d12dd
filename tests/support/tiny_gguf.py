"""A random one-layer Llama as a GGUF file, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZE, INNER, WORDS = 32, 48, 260


def write_gguf(path: Path) -> Path:
    """Write the file, which transformers converts in a moment."""
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
    writer.add_head_count_kv(4)
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
        shapes[f"blk.0.{name}"] = (SIZE, SIZE)
    shapes |= {"blk.0.attn_norm": (SIZE,), "blk.0.ffn_norm": (SIZE,)}
    shapes |= {"blk.0.ffn_gate": (INNER, SIZE), "blk.0.ffn_up": (INNER, SIZE)}
    shapes |= {"blk.0.ffn_down": (SIZE, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
