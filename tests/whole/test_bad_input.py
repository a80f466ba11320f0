"""What a user can get wrong about the model, the data and the options: one line that says what, and no output."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.causal import make_model, make_word_tokenizer
from support.commands import Command, Refused, content
from transformers import AutoModelForCausalLM, CLIPConfig, MixtralConfig, T5Config

# The model.

Change = Callable[[Path], object]


def without(*names: str) -> Change:
    return lambda directory: [(directory / name).unlink() for name in names]


def with_text(name: str, text: str) -> Change:
    return lambda directory: (directory / name).write_text(text)


def with_config(**changes: object) -> Change:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def with_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return change


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def sharded(*, lack: bool = False, index: str | None = None) -> Change:
    def change(directory: Path) -> None:
        AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="20KB")
        if (directory / "model.safetensors").exists():
            (directory / "model.safetensors").unlink()
        if lack:
            sorted(directory.glob("model-*.safetensors"))[1].unlink()
        if index is not None:
            (directory / "model.safetensors.index.json").write_text(index)

    return change


UP = "model.layers.1.mlp.up_proj.weight"
MODELS: dict[str, tuple[Change, str]] = {
    "no config": (without("config.json"), r"no model directory: it has no config\.json; give a directory with"),
    "config is no JSON": (with_text("config.json", "{nope"), r"config\.json' is not a valid JSON file"),
    "config without model type": (with_text("config.json", "{}"), r"Should have a `model_type` key"),
    "unknown model type": (with_config(model_type="zzz"), r"model type `zzz` but Transformers does not recognize"),
    "config with a wrong type": (with_config(hidden_size="big"), r"'hidden_size' expected int, got str"),
    "config with a wrong number": (with_config(num_attention_heads=0, head_dim=None), r"cannot be opened as .* zero"),
    "config with a negative size": (with_config(intermediate_size=-4), r"cannot be opened as .* negative dimension"),
    "unknown activation": (with_config(hidden_act="zzz"), r"cannot be opened as .* KeyError 'zzz'"),
    "quantized": (
        with_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"cannot be loaded: Loading a GPTQ quantized model requires",
    ),
    "no causal model": (
        lambda directory: T5Config().save_pretrained(directory),
        r"is an encoder-decoder; use --task seq2seq-lm, or sequence-classification$",
    ),
    "no language model": (
        lambda directory: CLIPConfig().save_pretrained(directory),
        r"cannot be opened as a causal language model: Unrecognized configuration class .*CLIPConfig.{0,60}$",
    ),
    "no weights": (without("model.safetensors"), r"has no model\.safetensors .*save_pretrained\("),
    "pickled": (pickled, r"pickled weights only \(pytorch_model\.bin\), which can run code .*save_pretrained\("),
    "cut off": (cut, r"cannot read .*model\.safetensors: .*; is the file complete\?"),
    "empty file": (with_text("model.safetensors", ""), r"cannot read .*model\.safetensors: .*is the file complete\?"),
    "no safetensors": (with_text("model.safetensors", "zzz" * 99), r"cannot read .*model\.safetensors: .*complete\?"),
    "missing shard": (sharded(lack=True), r"lacks 1 of \d+ shards, such as model-00002-of-.*is the download complete"),
    "index is no JSON": (sharded(index="{nope"), r"index\.json is no safetensors index"),
    "index without map": (sharded(index="{}"), r"index\.json is no safetensors index, with a weight_map"),
    "index of numbers": (sharded(index='{"weight_map": {"a": 3}}'), r"lacks 1 of 1 shards, such as 3"),
    "index is a list": (sharded(index="[]"), r"index\.json is no safetensors index, with a weight_map"),
    "missing tensor": (with_tensors(lambda t: t.pop(UP)), rf"lacks 1 tensors of LlamaForCausalLM, such as {UP}; is it"),
    "another shape": (
        with_tensors(lambda t: t.update({UP: torch.zeros(3, 4)})),
        rf"tensor {UP} of .* has shape \(3, 4\), the model expects \(48, 32\); does config\.json belong",
    ),
    "another shape outside of blocks": (
        with_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        r"tensor model\.norm\.weight of .* has shape \(3,\), the model expects \(32,\)",
    ),
    "config of a deeper model": (with_config(num_hidden_layers=4), r"lacks 9 tensors .* such as model\.layers\.3"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), r"no tokenizer .* beside config\.json"),
    "tokenizer is no JSON": (with_text("tokenizer.json", "{nope"), r"no tokenizer that can be read"),
    "tokenizer without model": (  # the library tokenizers raises a plain Exception
        with_text("tokenizer.json", '{"added_tokens": [], "model": {}}'),
        r"no tokenizer that can be read",
    ),
    "weight is no number": (
        with_tensors(lambda t: t[UP].__setitem__((3, 4), float("nan"))),
        r"the loss is nan; check the weights; in half precision, --dtype float32 may help",
    ),
    "weight is infinite": (
        with_tensors(lambda t: t[UP].__setitem__((3, 4), float("inf"))),
        r"the loss is (nan|inf); check the weights; in half precision, --dtype float32 may help",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    change, expected = MODELS[name]
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    change(directory)
    message = refused(model=directory)
    assert re.search(expected, message), message
    assert "unforeseen" not in message


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nothing", "there is no model directory ./nothing; give a directory with config.json"),
        ("some/where/else", "there is no model directory some/where/else; give"),
        ("~nobody/at/all", "there is no model directory ~nobody/at/all; give"),
        ("nothing.gguf", "there is no file nothing.gguf; give"),
        ("someone/unknown", "someone/unknown is neither a local directory nor a model to be had from the hub"),
        ("unknown", "unknown is neither a local directory nor a model to be had from the hub"),
        ("a" * 300, f"{'a' * 300} is neither a local directory nor"),
    ],
)
def test_model_that_is_not_there(
    model: str, expected: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert refused(model=model).startswith(f"Error: {expected}")


def test_model_is_a_file(refused: Refused, tiny_model: Path) -> None:
    file = tiny_model / "model.safetensors"
    assert f"{file} is a file; give a directory with" in refused(model=file)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems have no such names")
@pytest.mark.parametrize("what", ["model", "data", "output"])
def test_path_that_is_not_utf8(what: str, refused: Refused, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9.jsonl"
    if what == "model":
        shutil.copytree(tiny_model, odd)
    elif what == "data":
        shutil.copy(tiny_data, odd)
    message = refused(**{what: odd})
    assert message.endswith(r"caf\udce9.jsonl' is not UTF-8, so that libraries cannot open it; rename it")


def test_revision_of_a_directory(refused: Refused) -> None:
    assert "revision 'main' is for hub models" in refused("--revision", "main")


@pytest.mark.parametrize("head", [b"", b"no gguf file", b"GGUF\3\0\0\0" + b"\xff" * 100], ids=["empty", "text", "cut"])
def test_gguf_file_that_is_none(head: bytes, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "bad.gguf"
    file.write_bytes(head)
    message = refused(model=file)
    assert f"transformers cannot read {file}: " in message
    assert "is the file complete?" in message
    assert content(tmp_path / "cache") == {"loraone-init": None}


def test_gguf_without_a_home(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where HOME is not set and the system does not know the user."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    message = refused(model=tmp_path / "bad.gguf")
    assert "there is no home directory to keep a converted model in; set XDG_CACHE_HOME" in message


def test_gguf_without_a_place_for_the_cache(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    message = refused(model=tmp_path / "bad.gguf")
    assert "cannot write the converted model into" in message
    assert "set XDG_CACHE_HOME" in message


def test_tokenizer_made_from_nothing(refused: Refused, tmp_path: Path) -> None:
    """transformers makes GPT-2 a tokenizer of one token where there are no files for it."""
    make_model("gpt2", torch.float32).save_pretrained(tmp_path / "model")
    assert "no tokenizer that can be read" in refused(model=tmp_path / "model")


def test_tokenizer_of_another_model(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    make_word_tokenizer(num_words=150).save_pretrained(directory)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "w1 w140"}\n')
    message = refused(model=directory, data=data)
    assert "the tokenizer gives token id 143, but" in message
    assert "has 97 embeddings; does the tokenizer belong to the model?" in message


def test_row_with_more_tokens_than_positions(refused: Refused, command: Command, tmp_path: Path) -> None:
    make_model("gpt2", torch.float32).save_pretrained(tmp_path / "model")
    make_word_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "w1 " * 80}) + "\n")
    message = refused(model=tmp_path / "model", data=data)
    assert "a row has 81 tokens, but" in message
    assert message.endswith("has 64 positions; use --max-length 64")
    output = tmp_path / "a.safetensors"
    assert command(tmp_path / "model", data, "-o", output, "--max-length", 64).exit_code == 0


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop(EXPERT), r"some of its tensors are missing or have another shape .* does config\.json"),
        (lambda t: t.update({EXPERT: torch.zeros(3, 4)}), r"some of its tensors are missing or have another shape"),
        (lambda t: t.pop(QUERY), rf"lacks 1 tensors of MixtralForCausalLM, such as {QUERY}"),
        (lambda t: t.update({QUERY: torch.zeros(3, 4)}), r"has shape \(3, 4\), the model expects \(32, 32\)"),
    ],
    ids=["lacks expert", "expert's shape", "lacks other", "other's shape"],
)
def test_model_that_is_held_in_memory(
    edit: Callable[[dict[str, torch.Tensor]], object], expected: str, refused: Refused, tmp_path: Path
) -> None:
    """transformers loads it, and would draw what is missing at random."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_word_tokenizer().save_pretrained(tmp_path / "model")
    with_tensors(edit)(tmp_path / "model")
    message = refused(model=tmp_path / "model")
    assert re.search(expected, message), message


@pytest.fixture
def overflowing_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Small activations and a large head: in fp16 the loss is finite, but its gradient overflows in the last norm."""

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] *= 100.0
        for name in tensors:
            if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
                tensors[name] *= 1e-4

    directory = shutil.copytree(tiny_model, tmp_path / "model")
    with_tensors(scale)(directory)
    with_config(rms_norm_eps=1e-12)(directory)
    return directory


def test_gradient_that_overflows(overflowing_model: Path, refused: Refused) -> None:
    message = refused("--dtype", "float16", model=overflowing_model)
    assert re.search(r"the gradient of layer model\.layers\.\d\.\S+ is not finite; .* --dtype float32", message), (
        message
    )


def test_gradient_that_does_not_overflow_in_fp32(
    overflowing_model: Path, command: Command, tiny_data: Path, tmp_path: Path
) -> None:
    """The remedy that the message names helps."""
    result = command(overflowing_model, tiny_data, "-o", tmp_path / "a.safetensors", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr


# The data.


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rows.jsonl", "", "is empty; expected at least one row"),
        ("rows.jsonl", '{"text": "w1 w2"}\n{bad\n', "line 2 is not JSON"),
        ("rows.jsonl", '{"text": "w1 w2"}\n[1, 2]\n', "row 2 is not an object but list"),
        ("rows.jsonl", '{"a": "w1", "b": 2}\n', "row 1 has the columns a, b; expected one of: prompt + completion"),
        ("rows.jsonl", '{"text": "w1 w2"}\n{"other": "w1"}\n', "row 2 has no column 'text'; it has other"),
        ("rows.jsonl", '{"text": "w1 w2"}\n{"text": 3}\n', "row 2: column 'text' is number, expected a string"),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": "w1"}]}\n', "the tokenizer has no chat template"),
        ("rows.csv", "text\n", "has no rows"),
        ("rows.csv", "text\nw1,w2\n", "row 1 has more fields than the header"),
        ("rows.json", '{"a": 1}', "is an object with 0 lists in it; expected one list of rows"),
        ("rows.parquet", "no parquet", "cannot read"),
        ("rows.doc", "w1 w2", "unknown suffix '.doc'; expected one of .jsonl, .json"),
    ],
)
def test_data(name: str, text: str, expected: str, refused: Refused, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_text(text)
    message = refused(data=file)
    assert expected in message
    assert "unforeseen" not in message


def test_data_in_another_encoding(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"text": "w1"}\n{"text": "ä"}\n'.encode("latin-1"))
    assert "is not UTF-8 (line 2); save it as UTF-8" in refused(data=file)


@pytest.mark.parametrize("data", ["nothing.jsonl", "some/where/else", "-"])
def test_data_that_are_not_there(data: str, refused: Refused) -> None:
    assert f"'{data}' does not exist; give a file (.jsonl" in refused(data=data)


def test_data_is_a_directory(refused: Refused, tmp_path: Path) -> None:
    assert "is a directory; give one file (.jsonl" in refused(data=tmp_path)


def test_data_set_of_the_hub_without_the_hub(refused: Refused) -> None:
    pytest.importorskip("datasets")
    message = refused(data="someone/unknown")
    assert "'someone/unknown' is no file here, and as a data set from the hub (split 'train')" in message


def test_nothing_to_train_on(refused: Refused) -> None:
    message = refused("--max-length", 2)
    assert "no trainable tokens in the first 2 tokens of its 12 rows; raise --max-length, or" in message


# The options.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gamma", 0], "gamma must be a positive number, got 0.0"),
        (["--gamma", "inf"], "gamma must be a positive number, got inf"),
        (["--alpha", "nan"], "alpha must be a positive number, got nan"),
        (["--alpha", -1], "alpha must be a positive number, got -1.0"),
        (["--seed", -1], "seed must be a whole number from 0"),
        (
            ["--rank", 33],
            "rank 33 is larger than every layer allows, the largest being model.layers.0.self_attn.q_proj",
        ),
        (["--rank", 33], "q_proj of shape (32, 32); use --rank 32 or less"),
        (["--target-modules", "quer.|value"], "no linear layer matches target modules 'quer.|value'; there are: q_pro"),
        (["--target-modules", "q_proj,value"], "no layer is called 'value'; there are: q_proj (3), k_proj (3)"),
        (["--exclude-modules", "value"], "no layer is called 'value'; there are: q_proj (3), k_proj (3)"),
        (["--target-modules", ""], "target_modules is empty; use"),
        (["--target-modules", "*q_proj"], "'*q_proj' is not a regular expression: nothing to repeat at position 0"),
        (["--exclude-modules", "(q_proj"], "'(q_proj' is not a regular expression: missing )"),
        (["--exclude-modules", ".*"], "no linear layer matches target modules 'all-linear' without '.*'; there are"),
        (["--columns", "nonsense"], "--columns has 'nonsense'; expected name=column, such as prompt=question"),
        (["--columns", "label=prompt"], "--columns cannot name 'label'; expected one of text, prompt"),
        (["--columns", "text=body"], "row 1 has no column 'body', which --columns takes as 'text'; it has prompt, com"),
        (["--split", "train"], "split 'train' is for hub data sets, but"),
        (["--assistant-only"], "assistant-only needs conversational data, but the format is prompt-completion"),
        (["--block-path", "blocks"], "block path 'blocks' names no module list; there are: model.layers (3)"),
        (["--block-path", ""], "block path '' names no module list; there are: model.layers (3)"),
        (["--block-path", "model"], "block path 'model' names no module list: layers in it is a list itself; there"),
        (
            ["--device", "tpu9"],
            "device 'tpu9' cannot be used here: Invalid device string: 'tpu9'; use auto, cpu, cuda or",
        ),
        (["--device", ""], "device '' cannot be used here"),
        (["--device", "meta"], "device 'meta' holds no numbers; use auto, cpu or cuda"),
        (["--device", "hpu"], "device 'hpu' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_option(options: list[object], expected: str, refused: Refused) -> None:
    message = refused(*options)
    assert expected in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["MODEL", "DATA"],
        ["MODEL", "-o", "OUT"],
        ["MODEL", "DATA", "MORE", "-o", "OUT"],
        ["MODEL", "DATA", "-o", "OUT", "--unknown"],
        ["MODEL", "DATA", "-o", "OUT", "--rank", "0"],
        ["MODEL", "DATA", "-o", "OUT", "--rank", "eight"],
        ["MODEL", "DATA", "-o", "OUT", "--dtype", "int8"],
        ["MODEL", "DATA", "-o", "OUT", "--scaling", "none"],
        ["MODEL", "DATA", "-o", "OUT", "--samples", "0"],
        ["MODEL", "DATA", "-o", "OUT", "--max-length", "1"],
        ["MODEL", "DATA", "-o", "OUT", "--batch-size", "0"],
        ["MODEL", "DATA", "-o", "OUT", "--gamma", "much"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    known = {"MODEL": tiny_model, "DATA": tiny_data, "OUT": out / "a.safetensors"}
    result = command(*(known.get(argument, argument) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "\nError: " in result.stderr
    assert content(out) == {}
