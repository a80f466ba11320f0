"""What an adapter calls its base: no path of this machine where it can be helped, and told where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import Command

from loraone_init import Adapter, open_model
from loraone_init.cli.trainer_lines import lines_for_trainers
from loraone_init.models.sources import gguf_name, resolve_model


def test_given_name(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    done = command(tiny_model, tiny_data, "-o", out / "peft", "--base-name", "someone/tiny", "--json")
    assert done.exit_code == 0, done.output
    adapter = Adapter.load(out / "peft")
    assert adapter.base["name"] == "someone/tiny"
    assert json.loads((out / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert str(tiny_model) not in (out / "peft" / "README.md").read_text()
    assert str(tiny_model) in json.loads(done.stdout)["trainers"]["PEFT, TRL"]  # which are for this machine
    assert "names its base by a path" not in done.stderr


def test_path_is_told(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    told = command(tiny_model, tiny_data, "-o", out / "a.safetensors").stderr.splitlines()
    assert f"The adapter names its base by a path on this machine, {tiny_model}; --base-name gives another" in told
    assert any(line.startswith(f"The adapter names its data by a path on this machine, {tiny_data}") for line in told)


def test_path_in_a_directory_to_publish_is_a_warning(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path
) -> None:
    """--quiet prints it as well."""
    done = command(tiny_model, tiny_data, "-o", out / "peft", "--quiet")
    assert done.stderr == (
        f"Warning: The adapter names its base by a path on this machine, {tiny_model}; --base-name gives another\n"
        f"Warning: The adapter names its data by a path on this machine, {tiny_data}; a relative one is recorded as"
        " given\n"
    )


def test_gguf_file_has_its_own_name_and_hash(smollm2: Path, initialised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(smollm2.parent.parent))
    source = resolve_model("demo")
    assert source.directory == smollm2
    assert source.name == f"SmolLM2-135M-Instruct.Q4_1.gguf@sha256:{smollm2.name.rpartition('-')[2]}"
    opened = open_model("demo", weights=False)
    assert (opened.name, opened.opened_from) == (source.name, str(smollm2.resolve()))
    lines = lines_for_trainers(Adapter.load(initialised), Path("a"), opened.opened_from)
    assert str(smollm2.resolve()) in lines["PEFT, TRL"]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://huggingface.co/org/tiny", "org/tiny"),
        ("https://huggingface.co/org/tiny/tree/main", None),
        ("https://example.com/org/tiny", None),
        (None, None),
    ],
)
def test_gguf_file_is_called_by_the_repository_that_it_names(tmp_path: Path, url: str | None, name: str | None) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    if url is not None:
        writer.add_source_repo_url(url)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = gguf_name(str(file))
    assert found == name or (name is None and str(found).startswith("tiny.gguf@sha256:"))
