"""llama.cpp on a LLaMA decoder. Run by a Python that has gguf, llama-cpp-python and safetensors.

python llama_cpp_decoder.py convert CHECKPOINT OUT.gguf   # the checkpoint's decoder as Q4_0, norms in float32
python llama_cpp_decoder.py run OUT.gguf PROMPT NEW       # JSON: tokens per second of prefill and decode

Imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

THREADS = 2
RUNS = 2
PREFIX = "language_model."
LAYER_NAMES = {  # llama.cpp's ← the checkpoint's
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(checkpoint: str, output: str) -> None:
    """Write the decoder of a checkpoint as GGUF, tensor by tensor."""
    import gguf

    folder = Path(checkpoint)
    config = json.loads((folder / "config.json").read_text())["text_config"]
    writer = gguf.GGUFWriter(output, "llama")
    _add_sizes(writer, config)
    _add_vocabulary(writer, config["vocab_size"])
    _add_tensors(writer, folder, config["num_hidden_layers"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(2)


def _add_vocabulary(writer: Any, size: int) -> None:
    """Special tokens, bytes, and made-up names for the rest: only ids are used."""
    tokens = [b"<unk>", b"<s>", b"</s>"]
    tokens += [f"<0x{i:02X}>".encode() for i in range(256)]
    tokens += [f"token{i}".encode() for i in range(size - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (size - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensors(writer: Any, folder: Path, layers: int) -> None:
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Kind
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as reader:
            files |= dict.fromkeys(reader.keys(), path)

    def add(name: str, source: str, kind: Any = None) -> None:
        with safe_open(files[PREFIX + source], "np") as reader:
            array = reader.get_tensor(PREFIX + source).astype(np.float32)
        writer.add_tensor(name, array if kind is None else gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight", Kind.Q4_0)
    add("output.weight", "lm_head.weight", Kind.Q8_0)  # as in our int4 preset
    add("output_norm.weight", "model.norm.weight")
    for i in range(layers):
        for name, source in LAYER_NAMES.items():
            add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{source}.weight", Kind.Q4_0)
        add(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight")
        add(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight")


def run(path: str, prompt: int, new: int) -> None:
    """Print tokens per second of prefill and decode.

    Args:
        path: A GGUF file.
        prompt: Tokens of the prompt.
        new: Tokens to decode.
    """
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        path,
        n_ctx=1280,
        n_batch=prompt,
        n_ubatch=512,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        verbose=False,
        logits_all=False,
    )
    tokens = [1, *np.random.default_rng(0).integers(300, 30000, prompt - 1).tolist()]
    prefill, decode = [], []
    for _ in range(RUNS):
        model.reset()
        started = time.perf_counter()
        model.eval(tokens)
        prefill.append(time.perf_counter() - started)
        started = time.perf_counter()
        for i in range(new):
            model.eval([300 + i])
        decode.append((time.perf_counter() - started) / new)
    report = {"version": llama_cpp.__version__, "prefill": prompt / min(prefill), "decode": 1 / min(decode)}
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3])
    else:
        run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
