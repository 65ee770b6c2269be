"""Model names: a path, or the name of a model that comes with the package."""

import os

from .errors import ModelNotFoundError

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")


def built_in_models() -> list[str]:
    """Names of the models in the package."""
    names = os.listdir(_FOLDER) if os.path.isdir(_FOLDER) else []
    return sorted(name[:-5] for name in names if name.endswith(".gguf"))


def find_model(name_or_path: str | os.PathLike) -> str:
    """Path of a GGUF file, given its path or a built-in name. Raises ModelNotFoundError."""
    name = os.fspath(name_or_path)
    if os.path.isfile(name):
        return name
    if name in built_in_models():
        return os.path.join(_FOLDER, name + ".gguf")
    what = (
        "a folder, not a GGUF file (amber-quantize converts Hugging Face folders)"
        if os.path.isdir(name)
        else "no such file"
    )
    raise ModelNotFoundError(
        f"{name}: {what}, and no built-in model of that name "
        f"(built in: {', '.join(built_in_models()) or 'none'})"
    )
