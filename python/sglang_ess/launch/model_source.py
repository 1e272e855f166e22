"""config.json of the model that --model-path names, read before SGLang reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_ess.errors import Refusal


def read_model_config(server_args: Any) -> dict[str, Any] | None:
    """config.json of --model-path with --json-model-override-args applied.

    Returns None if only SGLang can read the model (see model_source).
    Effect: fetches the file from the Hugging Face Hub for a name org/name.
    Raises: Refusal if there is no such model, or its config.json cannot be read.
    """
    file = model_source(str(server_args.model_path))
    if isinstance(file, str):
        file = _fetch_config(file, server_args)
    if file is None:
        return None
    model = _json_object(_text(file), str(file))
    override = _json_object(server_args.json_model_override_args, "--json-model-override-args")
    return {**mapping(model.get("text_config")), **model, **override}


def model_source(path: str) -> Path | str | None:
    """Where config.json is: a file, or a name on the Hugging Face Hub.

    Returns None for what only SGLang can read: URLs, GGUF files, "dummy" and ModelScope names.
    Raises: Refusal for a path that is none of these.
    """
    if path.lower() in ("none", "dummy") or "://" in path or ".gguf" in path.lower():
        return None
    if os.path.exists(path):
        file = Path(path) / "config.json"
        if not file.is_file():
            raise Refusal(
                f"--model-path must be a directory with config.json: got {path!r} without one. "
                "Name the checkpoint's own directory."
            )
        return file
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise Refusal(
            f"--model-path must be a directory or a Hugging Face name org/name: got {path!r}, "
            "which does not exist. Correct the path."
        )
    in_modelscope = os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true", "yes")
    return None if in_modelscope else path


def _fetch_config(name: str, server_args: Any) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(
            name, "config.json", revision=server_args.revision, cache_dir=server_args.download_dir
        )
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise Refusal(
            f"--model-path must name a model on the Hugging Face Hub or a directory: got {name!r} "
            f"({type(error).__name__}: {line}). Check the name, HF_TOKEN and the network."
        ) from None
    return Path(file)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} must be readable text: got {error}. Correct the file.") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refusal(f"{where} must be JSON: got {error}. Correct the file or flag.") from None
    if not isinstance(value, dict):
        raise Refusal(f"{where} must be a JSON object: got {type(value).__name__}. Correct it.")
    return value


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}
