"""The embedded model and data set: where they lie. Importing this costs nothing."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

TINY_MODEL = _HERE / "tiny_chatglm3"
"""A tiny ChatGLM3 checkpoint in the published layout; ``python -m helpers.chatglm3.tiny`` rebuilds it."""

TINY_DATA = _HERE / "advertise_tiny"
"""``train.json`` and ``dev.json`` in AdvertiseGen's shape; ``python -m helpers.assets.advertise`` rebuilds them."""
