"""Configurations of checkpoints, as PPLLaVA and PLLaVA publish them, with small sizes."""

from __future__ import annotations

from typing import Any

_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 108,
    "patch_size": 12,
    "hidden_act": "quick_gelu",
}
_DECODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
_QUESTION = {
    "model_type": "clip",
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
}
CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "name": "guided",
        "model_type": "llava_next",
        "pooling": "ppllava",
        "pooling_kernel": [2, 3, 3],
        "pooling_stride": "(2, 3, 3)",
        "pooling_temp": 0.01,
        "image_pooling_kernel": [1, 3, 3],
        "image_pooling_stride": [1, 3, 3],
        "frame_shape": [9, 9],
        "btadapter": True,
        "btadapter_depth": 3,
        "max_T": 64,
        "extend_clip": True,
        "clip_weight": "clip",
        "image_token_index": 319,
        "image_grid_pinpoints": [[108, 216], [216, 108]],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "num_frames": 16,
        "prompt_template": {"system": "", "roles": ["", "<a>"], "separators": [" ", "</s>"]},
        "vision_config": _VISION,
        "text_config": {"model_type": "llama", **_DECODER, "eos_token_id": 2},
        "question_config": _QUESTION,
    },
    {
        "pooling": "pllava",
        "pllava_pooling_shape": [8, 3, 3],
        "vision_config": _VISION,
        "text_config": {
            "model_type": "qwen2",
            **_DECODER,
            "num_key_value_heads": 2,
            "eos_token_id": [2, 3],
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    },
)
