"""Other engines and video readers, compared with ours: `python -m ppllava_edge.bench.peers`.

Imported by bench/long_video.py only. openvino_vision.py and llama_cpp_decoder.py import nothing of ours:
another Python with those libraries runs them by their path.
"""
