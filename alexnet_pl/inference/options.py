"""Values that the help texts of the commands name, importable without torch."""

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
"""Export format -> suffix of the file."""

MAX_DRAWN = 40
"""Images in one drawing; more would be unreadable."""

MAX_UPLOAD = "10mb"
"""Largest file that the web page accepts."""

MAX_PIXELS = 40_000_000
"""Largest image, in pixels, that a visitor of the web page may have decoded."""
