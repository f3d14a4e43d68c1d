"""Read a base model's ``generation_config.json`` so that it can be written again."""

from pathlib import Path

from transformers import GenerationConfig

from helpers.errors import UserError
from helpers.files import read_json_object

GENERATION_CONFIG = "generation_config.json"
# Without do_sample, transformers reads these silently, but refuses to write them.
SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def read_generation_config(folder: Path) -> tuple[GenerationConfig | None, str]:
    """Read the generation configuration in a model's folder, without sampling values, which contradict greedy decoding.

    Args:
        folder: The model's.

    Returns:
        The configuration, or None without such a file; and a text that lists the sampling values left out, or "".

    Raises:
        UserError: The file is not a JSON object, or holds values that transformers refuses.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return None, ""
    content = read_json_object(path, f"no file {path}", remedy="correct or remove it")
    dropped: dict[str, object] = {}
    if content.get("do_sample") is not True:
        dropped = {key: content.pop(key) for key in SAMPLING if content.get(key) is not None}
    try:
        generation_config = GenerationConfig.from_dict(content)
        generation_config.validate(strict=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; correct or remove it") from error
    return generation_config, ", ".join(f"{key} = {value}" for key, value in dropped.items())
