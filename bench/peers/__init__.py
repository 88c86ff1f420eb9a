"""Other engines and video readers, measured beside ours: `python -m ppllava_edge.bench.peers`.

Imported by bench/long_video.py only. openvino_vision.py and llama_cpp_decoder.py import nothing of ours:
another Python, which has those libraries, runs them by their path.
"""
