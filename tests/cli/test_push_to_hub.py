"""`--push-to-hub` against a local server that speaks the hub's calls; what it refuses, before the work where it can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, constants
from support.commands import Command, error_line
from support.hub_server import GOOD, POWERLESS, READ_ONLY, Hub, running_hub

from loraone_init import Adapter
from loraone_init.cli.train import main as train


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What the library reads of the environment when it is imported is set here; Xet's own protocol is off."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.mark.parametrize("output", ["a.safetensors", "peft"])
def test_adapter_is_published_with_its_card(
    hub: Hub, command: Command, tiny_model: Path, tiny_data: Path, out: Path, output: str
) -> None:
    given = ("--push-to-hub", "org/lora", "--private", "--token", GOOD, "--base-name", "org/base", "--license", "mit")
    done = command(tiny_model, tiny_data, "-o", out / output, *given, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["published"] == f"{hub.address}/org/lora"
    repository = hub.repositories["org/lora"]
    assert repository["private"]
    files = repository["files"]
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loraone-init.yaml",
        "loraone.json",
    ]
    weights = out / output if output.endswith("s") else out / output / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-one"],
    }
    assert '"org/lora", is_trainable=True' in card.text
    assert yaml.safe_load(files["loraone-init.yaml"])["model"] == "org/base"
    assert not any(str(tiny_model).encode() in content or GOOD.encode() in content for content in files.values())
    calls = [call for call in hub.calls if call != "GET /api/agent-harnesses"]  # for the library's own user agent
    assert calls[:2] == ["GET /api/whoami-v2", "GET /api/models/org/lora"]  # before the work


def test_trained_adapter_is_published(
    hub: Hub, initialised: Path, tiny_model: Path, tiny_data: Path, out: Path
) -> None:
    given = [tiny_model, tiny_data, "--adapter", initialised, "--max-steps", 1, "--device", "cpu", "-o", out / "t"]
    done = CliRunner().invoke(train, [*map(str, given), "--push-to-hub", "lora", "--token", GOOD])
    assert done.exit_code == 0, done.stderr
    assert f"published: {hub.address}/someone/lora" in done.stdout
    files = hub.repositories["someone/lora"]["files"]
    assert files["adapter_model.safetensors"] == (out / "t" / "adapter_model.safetensors").read_bytes()
    assert not hub.repositories["someone/lora"]["private"]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("org/lora", ("--token", "hf_bad"), "the hub does not know the token"),
        ("org/lora", ("--token", READ_ONLY), "the token may only read"),
        ("other/lora", ("--token", GOOD), "the token is someone's, who is not in other"),
        ("org/a/b", ("--token", GOOD), "is no name of a repository"),
        ("org/full", ("--token", GOOD), "org/full on the hub holds README.md already; choose another name, or pass"),
        ("org/full", ("--token", GOOD, "--private", "--overwrite"), "org/full on the hub is public already"),
    ],
)
def test_refused_before_the_work(
    hub: Hub,
    command: Command,
    tiny_model: Path,
    tiny_data: Path,
    out: Path,
    name: str,
    options: tuple[str, ...],
    told: str,
) -> None:
    hub.repositories["org/full"] = {"private": False, "files": {".gitattributes": b"", "README.md": b"mine"}}
    done = command("nowhere", tiny_data, "-o", out / "a.safetensors", "--push-to-hub", name, *options)
    assert (done.exit_code, done.stdout) == (1, "")
    assert told in error_line(done.stderr)
    assert list(out.iterdir()) == []
    assert hub.repositories.keys() == {"org/full"}


def test_no_token_no_network_offline(
    hub: Hub, command: Command, tiny_data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = ("nowhere", tiny_data, "-o", out / "a.safetensors", "--push-to-hub", "org/lora")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "the hub wants a token to write org/lora; pass --token" in error_line(command(*run).stderr)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in error_line(command(*run, "--token", GOOD).stderr)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_line(command(*run, "--token", GOOD).stderr)
    usage = command("nowhere", tiny_data, "-o", out / "a.safetensors", "--private")
    assert (usage.exit_code, "--private is for --push-to-hub" in usage.stderr) == (2, True)


def test_refused_upload_leaves_the_adapter(
    hub: Hub, command: Command, tiny_model: Path, tiny_data: Path, out: Path
) -> None:
    """A token of the newer kind does not tell beforehand what it may."""
    file = out / "a.safetensors"
    done = command(tiny_model, tiny_data, "-o", file, "--push-to-hub", "org/lora", "--token", POWERLESS)
    assert done.exit_code == 1
    told = done.stderr.splitlines()[-1]
    assert told.startswith("Error: the hub does not let this token write to org/lora")
    assert told.endswith(f"{file} is written and whole")
    assert len(Adapter.load(file).pairs) == 21
    assert hub.repositories == {}
