"""GGUF files to convert: a small random Llama or Qwen2, and whatever is to be wrong with it."""

import gguf
import numpy as np
import tokenizers

H, G, K, C, F, LAYERS = 6, 2, 8, 32, 64, 2  # with 4 and 2 heads some wrong orders are right
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "he", "ll", "hell", "hello", "Ġw", "12", "123", "<|begin|>", "<|end|>", "<think>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"]
BEGIN, END, THINK = (TOKENS.index(name) for name in ("<|begin|>", "<|end|>", "<think>"))
TYPES = [1] * (len(TOKENS) - 3) + [3, 3, 4]
V = len(TOKENS)


def drawn(seed=0, biases=(), head=False):
    """Random tensors by llama.cpp's names, float32, (out, in) and in the order of the file."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (V, C), "output_norm.weight": (C,)}
    if head:
        shapes["output.weight"] = (V, C)
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (C,), "attn_q": (H * K, C), "attn_k": (G * K, C), "attn_v": (G * K, C),
            "attn_output": (C, H * K), "ffn_norm": (C,), "ffn_gate": (F, C), "ffn_up": (F, C),
            "ffn_down": (C, F),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = shape
            if name in biases:
                shapes[f"blk.{i}.{name}.bias"] = shape[:1]
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def a_file(path, tensors=None, *, kind="llama", fields=(), types=(), **options):
    """Write a GGUF file; a field of None is left out, `types` are quantised types by name."""
    writer = gguf.GGUFWriter(path, kind, **options)
    own = {
        "context_length": 64, "embedding_length": C, "block_count": LAYERS,
        "feed_forward_length": F,
        "attention.head_count": H, "attention.head_count_kv": G, "attention.key_length": K,
        "attention.value_length": K, "rope.dimension_count": K, "rope.freq_base": 1e5,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    tokenizer = {
        "model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": TYPES, "merges": MERGES,
        "bos_token_id": BEGIN, "eos_token_id": END, "add_bos_token": False,
    }  # fmt: skip
    every = {f"{kind}.{name}": value for name, value in own.items()}
    every |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    for name, value in (every | dict(fields)).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, tensor in (drawn() if tensors is None else tensors).items():
        if name in dict(types):
            writer.add_tensor(name, gguf.quantize(tensor, types[name]), raw_dtype=types[name])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
