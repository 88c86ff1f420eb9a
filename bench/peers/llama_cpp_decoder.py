"""llama.cpp on a LLaMA decoder, in an environment of its own (gguf, llama-cpp-python, safetensors). Stands alone.

python peer_llama_cpp.py convert CHECKPOINT OUT.gguf     the decoder of a checkpoint as Q4_0, norms in float32
python peer_llama_cpp.py run OUT.gguf PROMPT NEW         → JSON: tokens a second of prefill and decode
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(checkpoint: str, output: str) -> None:
    """Tensor by tensor."""
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Kind
    from safetensors import safe_open

    folder = Path(checkpoint)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    width, layers, heads, vocab = (
        text["hidden_size"],
        text["num_hidden_layers"],
        text["num_attention_heads"],
        text["vocab_size"],
    )
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_file_type(2)
    writer.add_tokenizer_model("llama")
    tokens = (
        [b"<unk>", b"<s>", b"</s>"]
        + [f"<0x{i:02X}>".encode() for i in range(256)]
        + [f"token{i}".encode() for i in range(vocab - 259)]
    )
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as reader:
            files |= dict.fromkeys(reader.keys(), path)

    def add(name: str, source: str, kind: Kind | None = None) -> None:
        with safe_open(files["language_model." + source], "np") as reader:
            array = reader.get_tensor("language_model." + source).astype(np.float32)
        writer.add_tensor(name, array if kind is None else gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight", Kind.Q4_0)
    add("output.weight", "lm_head.weight", Kind.Q8_0)  # as in our int4 preset
    add("output_norm.weight", "model.norm.weight")
    for i in range(layers):
        for ours, theirs in NAMES.items():
            add(f"blk.{i}.{theirs}.weight", f"model.layers.{i}.{ours}.weight", Kind.Q4_0)
        add(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight")
        add(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(path: str, prompt: int, new: int) -> None:
    """Two threads, as the others."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        path,
        n_ctx=1280,
        n_batch=prompt,
        n_ubatch=512,
        n_threads=2,
        n_threads_batch=2,
        verbose=False,
        logits_all=False,
    )
    tokens = [1, *np.random.default_rng(0).integers(300, 30000, prompt - 1).tolist()]
    prefill, decode = [], []
    for _ in range(2):
        model.reset()
        started = time.perf_counter()
        model.eval(tokens)
        prefill.append(time.perf_counter() - started)
        started = time.perf_counter()
        for i in range(new):
            model.eval([300 + i])
        decode.append((time.perf_counter() - started) / new)
    print(
        json.dumps(
            {"version": llama_cpp.__version__, "prefill": prompt / min(prefill), "decode": 1 / min(decode)}
        )
    )


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3])
    else:
        run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
