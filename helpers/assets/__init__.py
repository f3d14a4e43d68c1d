"""Paths of the embedded model and data set."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

TINY_MODEL = _FOLDER / "tiny_chatglm3"
"""A tiny ChatGLM3 checkpoint in the published layout; ``python -m helpers.chatglm3.tiny`` rebuilds it."""

TINY_DATA = _FOLDER / "advertise_tiny"
"""``train.json`` and ``dev.json`` in AdvertiseGen's shape; ``python -m helpers.assets.advertise`` rebuilds them."""
