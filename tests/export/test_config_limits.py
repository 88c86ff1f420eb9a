"""Values of config.json that have another type, or sizes that no model has, are refused by their place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.config.model import Overrides
from ppllava_edge.export.config.reader import read_model
from ppllava_edge.export.sources.locate import read_json
from ppllava_edge.export.sources.tensors import Checkpoint

CONFIG: dict[str, Any] = {
    "pooling": "avp",
    "vision_config": {"hidden_size": 32, "num_attention_heads": 4, "image_size": 108, "patch_size": 12},
    "text_config": {"model_type": "llama", "hidden_size": 48, "vocab_size": 320},
}


def refusal(*keys: str, value: object) -> str:
    """The message for a configuration with one value changed."""
    config = copy.deepcopy(CONFIG)
    section = config
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
    with pytest.raises(PPLLaVAError) as refused:
        read_model(config, None, Overrides())
    return str(refused.value)


@pytest.mark.parametrize("value", ["768", None, 0, -1, 1.5, [], {}, True, 10**30, float("inf")])
def test_sizes_are_whole_numbers_within_limits(value: object) -> None:
    assert "`$.vision_config.hidden_size`" in refusal("vision_config", "hidden_size", value=value)
    assert "`$.text_config.num_hidden_layers`" in refusal("text_config", "num_hidden_layers", value=value)


@pytest.mark.parametrize(
    "keys, value",
    [
        (("vision_feature_layer",), None),
        (("frame_shape",), [9]),
        (("image_grid_pinpoints",), [[108]]),
        (("image_grid_pinpoints",), [[108, 1 << 40]]),
        (("text_config", "rope_scaling"), {"type": "linear", "factor": "a"}),
        (("text_config", "eos_token_id"), {"a": 1}),
        (("text_config", "rms_norm_eps"), float("nan")),
        (("pooling_kernel",), "2, 3, 3" * 100),
        (("num_frames",), 10**9),
        (("btadapter_depth",), [4]),
    ],
)
def test_other_values_are_refused_by_their_place(keys: tuple[str, ...], value: object) -> None:
    message = refusal(*keys, value=value)
    assert message.startswith("config.json can't be used: ") and f"$.{'.'.join(keys)}" in message
    assert len(message) < 300


def test_names_from_the_file_are_printed_short_and_without_control_characters() -> None:
    for keys in (("text_config", "model_type"), ("vision_config", "model_type")):
        message = refusal(*keys, value="\x1b[2J" + "x" * 1000)
        assert message.isprintable() and len(message) < 300
    assert refusal("text_config", "\ud800", value=1).startswith("config.json can't be used")


@pytest.mark.parametrize("text", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000, '"\\ud800', "\udcff"])
def test_json_that_python_refuses_in_other_ways(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PPLLaVAError, match="can't be read as JSON"):
        read_json(path)


@pytest.mark.parametrize("shards", [[], None, {"a": None}, {"a": 1, "b": "x"}, {"a": ["x"]}, {"a": "../x"}])
def test_an_index_that_names_no_files(tmp_path: Path, shards: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(PPLLaVAError, match="names files outside the checkpoint, or isn't an index"):
        Checkpoint(tmp_path)


def test_missing_shards_are_listed_in_one_short_line(tmp_path: Path) -> None:
    names = {"a": "\x1b[2J" + "x" * 5000, "b": "y\0z"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(PPLLaVAError, match="lists shards that are missing") as refused:
        Checkpoint(tmp_path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_the_library_s_words_about_a_hostile_header_are_cut(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "\x07" * 5000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    header = header.replace(b"\\u0007", b"\\u001b")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(PPLLaVAError, match="is not a valid safetensors file") as refused:
        Checkpoint(tmp_path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500
