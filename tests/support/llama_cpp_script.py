"""Save the logits of llama.cpp for a GGUF model with a LoRA; run by the interpreter of that peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, adapter: str, target: str) -> None:
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    loaded = lib.llama_model_load_from_file(model.encode(), settings)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_threads = 64, 1
    context = lib.llama_init_from_model(loaded, options)
    ids = list(range(4, 20))
    found = {}
    for name in ("base", "adapted"):
        if name == "adapted":
            lora = lib.llama_adapter_lora_init(loaded, adapter.encode())
            assert lora != ffi.NULL, "llama.cpp refuses the adapter"
            done = lib.llama_set_adapters_lora(
                context,
                ffi.new("struct llama_adapter_lora *[]", [lora]),
                1,
                ffi.new("float[]", [1]),
            )
            assert done == 0
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
        tokens = ffi.new("llama_token[]", ids)
        assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))) == 0
        logits = lib.llama_get_logits(context)
        found[name] = [
            logits[i] for i in range(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded)))
        ]
    Path(target).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:4])
