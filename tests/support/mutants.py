"""Seeded mutants of what users hand to the four commands: adapters, models, data, option values, checkpoints."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraone_init.adapter.adapter import Adapter
from loraone_init.cli.export import main as export_command
from loraone_init.cli.init import main as init_command
from loraone_init.cli.inspect import main as inspect_command
from loraone_init.cli.train import main as train_command
from support.causal import make_model, make_word_tokenizer
from support.exports import make_moe
from support.gguf_models import write_model

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@dataclass(frozen=True)
class World:
    """Valid inputs. model and sharded: model directories; adapter: one file; peft: a directory; trained: with a
    checkpoint; rows: data; gguf: a model in one file; others: more models with an adapter, whose records have what the
    first one's lacks: searches, several ranks, a training, a head, experts.
    """

    model: Path
    sharded: Path
    adapter: Path
    peft: Path
    trained: Path
    rows: Path
    gguf: Path
    others: tuple[tuple[Path, Path], ...]


@dataclass(frozen=True)
class Mutant:
    """A command to run on a mutated input, and what was mutated. environment: variables to set; None unsets."""

    kind: str
    what: str
    command: click.Command
    arguments: tuple[str, ...]
    environment: Mapping[str, str | None]

    def run(self) -> Result:
        return CliRunner().invoke(self.command, list(self.arguments), env=dict(self.environment))


def complaint(result: Result) -> str | None:
    """What is wrong with the way a command ended; None where it did its work or said in one line why it cannot."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"exception {result.exception!r}"
    if result.exit_code not in (0, 1, 2):
        return f"exit code {result.exit_code}"
    for word in ("unforeseen", "Traceback"):
        if word in result.output:
            return word
    last = result.stderr.splitlines()[-1:] or [""]
    if result.exit_code and not last[0].startswith("Error: "):
        return f"no error line, but {last[0]!r}"
    return None


def make_world(directory: Path) -> World:
    model, sharded, rows = directory / "model", directory / "sharded", directory / "rows.jsonl"
    net = make_model("llama", torch.float32)
    tokenizer = make_word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for place, size in ((model, "1GB"), (sharded, "20KB")):
        net.save_pretrained(place, max_shard_size=size)
        tokenizer.save_pretrained(place)
    lines = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{7 * i} w{5 * i} w3"} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter, peft, trained = directory / "adapter.safetensors", directory / "peft", directory / "trained"
    _succeed(init_command, model, rows, "-o", adapter, "--rank", 4, "--samples", 4, "--seed", 1, "--gamma", 128)
    Adapter.load(adapter).save(peft)
    rich, finished = directory / "rich.safetensors", directory / "finished"
    search = ("--gamma", "auto", "--samples", "auto", "--rank-budget", 4)
    _succeed(init_command, model, rows, "-o", rich, *search)
    _succeed(train_command, model, rows, "--adapter", rich, "-o", finished, *TRAINING)
    texts, classifier = directory / "texts.jsonl", directory / "classifier.safetensors"
    texts.write_text("".join(f'{{"text": "w1 w{i}", "label": {i}}}\n' for i in range(3)))
    _succeed(init_command, model, texts, "-o", classifier, "--task", "sequence-classification", "--gamma", 128)
    moe, experts = directory / "moe", directory / "experts.safetensors"
    make_moe("qwen3_moe").save_pretrained(moe)
    tokenizer.save_pretrained(moe)
    _succeed(init_command, moe, rows, "-o", experts, "--samples", 2, "--gamma", 128)
    others = (model, finished / "adapter_model.safetensors"), (model, classifier), (moe, experts)
    _succeed(train_command, model, rows, "--adapter", adapter, "-o", trained, *TRAINING, "--save-steps", 1)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "training_log.json"):
        (trained / name).unlink()  # as if it had been interrupted
    gguf = directory / "model.gguf"
    write_model(gguf, net)
    return World(model, sharded, adapter, peft, trained, rows, gguf, others)


TRAINING = ("--max-steps", 1, "--batch-size", 2, "--samples", 4)


def _succeed(command: click.Command, *arguments: object) -> None:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output


def make_mutant(world: World, kind: str, seed: int, directory: Path) -> Mutant:
    """Mutant number `seed` of one of KINDS, with its files in `directory`, which is empty."""
    return KINDS[kind](_Maker(world, directory, random.Random(f"{kind} {seed}"), kind))


# JSON that no program of ours wrote.

_DIGITS, _DEEP = "<5000 digits>", "<nested>"
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -2.5,
    10**30,
    -(10**30),
    2**63,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00\x1b[31m",
    "3",
    "\udcff",
    "ä" * 3000,
    "../../x",
    [],
    [[]],
    [None],
    ["x"],
    [1, "x"],
    {},
    {"x": 1},
    {"": {}},
    _DIGITS,
    _DEEP,
)


def odd_json(chance: random.Random, value: Any) -> tuple[str, str]:
    """JSON text with one place changed, and what was changed."""
    value = json.loads(json.dumps(value))
    place = _place(chance, value)
    odd = chance.choice(_ODD)
    action = chance.choice(("replace", "replace", "replace", "delete", "add", "wrap"))
    what = f"{action} {'.'.join(map(str, place))} {str(odd)[:40]!r}"
    if not place or action == "replace":
        value = _replaced(value, place, odd)
    elif action == "delete":
        del _inside(value, place[:-1])[place[-1]]
    elif action == "wrap":
        value = _replaced(value, place, [_inside(value, place)])
    else:
        parent = _inside(value, place[:-1])
        parent.append(odd) if isinstance(parent, list) else parent.update({"unknown": odd})
    return _dumped(value), what


def _dumped(value: Any) -> str:
    text = json.dumps(value)
    return text.replace(f'"{_DIGITS}"', "7" * 5000).replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000)


def _place(chance: random.Random, value: Any) -> tuple[Any, ...]:
    """Keys from the top to some place in `value`: what is further up is as likely as all that is below it."""
    place: tuple[Any, ...] = ()
    while isinstance(value, (dict, list)) and value and chance.random() < 0.8:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        place, value = (*place, key), value[key]
    return place


def _inside(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def _replaced(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    if not place:
        return odd
    _inside(value, place[:-1])[place[-1]] = odd
    return value


def odd_bytes(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """A file's bytes, cut short, emptied, with some changed, or something else altogether."""
    action = chance.choice(("cut", "empty", "flip", "other", "doubled", "utf-16", "deep", "digits"))
    if action == "cut":
        return content[: chance.randrange(max(1, len(content)))], action
    if action == "flip":
        changed = bytearray(content)
        for _ in range(chance.choice((1, 3, 30))):
            changed[chance.randrange(min(len(changed), chance.choice((16, 600, len(changed)))))] = chance.randrange(256)
        return bytes(changed), action
    others = {
        "empty": b"",
        "other": chance.choice((b"\xff\xfe\xfa" * 9, b"null", b"[]", b"3", b'"x"', b"{}", b"\n\n", b"{nope", b"PAR1")),
        "doubled": content + content,
        "utf-16": content.decode("latin-1").encode("utf-16"),
        "deep": b"[" * 100_000,
        "digits": b"7" * 5000,
    }
    return others[action], action


@dataclass
class _Maker:
    world: World
    directory: Path
    chance: random.Random
    kind: str

    def mutant(
        self, what: str, command: click.Command, *arguments: object, environment: Mapping[str, str | None] | None = None
    ) -> Mutant:
        return Mutant(self.kind, what, command, tuple(map(str, arguments)), environment or {})

    @property
    def out(self) -> Path:
        return self.directory / "out"

    def source(self) -> tuple[Path, Path]:
        """One of the models with an adapter in one file; more often the plain one."""
        plain = self.world.model, self.world.adapter
        return self.chance.choice((plain, plain, plain, *self.world.others))

    def on_adapter(self, what: str, adapter: Path, model: Path | None = None) -> Mutant:
        """One of the commands that read an adapter."""
        model, rows = model or self.world.model, self.world.rows
        chosen = self.chance.randrange(12)
        if chosen < 4:
            return self.mutant(what, inspect_command, adapter, *self.chance.choice(((), ("--json",), ("--layers",))))
        if chosen == 4:
            return self.mutant(what, inspect_command, adapter, "--html", self.directory / "page.html")
        if chosen == 5:
            return self.mutant(what, inspect_command, adapter, "--compare", self.world.adapter)
        if chosen < 8:
            return self.mutant(what, export_command, "peft", model, adapter, "-o", self.out, "--plain-scaling")
        if chosen == 8:
            return self.mutant(what, export_command, "peft", model, adapter, "-o", f"{self.out}.safetensors")
        if chosen == 9:
            return self.mutant(what, train_command, model, rows, "--adapter", adapter, "-o", self.out, *TRAINING)
        return self.mutant(what, export_command, "merged", model, adapter, "-o", self.out)

    def on_model(self, what: str, model: Path) -> Mutant:
        """One of the commands that read a model."""
        rows, adapter = self.world.rows, self.world.adapter
        chosen = self.chance.randrange(9)
        if chosen < 3:
            return self.mutant(what, init_command, model, rows, "--dry-run", "--samples", 2)
        if chosen == 8:
            texts = self.directory / "texts.jsonl"
            texts.write_text("".join(f'{{"text": "w1 w{i}", "label": {i}}}\n' for i in range(2)))
            arguments = ("--task", "sequence-classification", "-o", self.out, "--target-modules", "q_proj")
            return self.mutant(what, init_command, model, texts, *arguments)
        if chosen < 5:
            return self.mutant(
                what,
                init_command,
                model,
                rows,
                "-o",
                self.out,
                "--samples",
                2,
                "--gamma",
                128,
                "--target-modules",
                "q_proj",
            )
        if chosen < 7:
            return self.mutant(what, train_command, model, rows, "--adapter", adapter, "-o", self.out, *TRAINING)
        return self.mutant(what, export_command, "merged", model, adapter, "-o", self.out, "--any-base")


def _record(make: _Maker) -> Mutant:
    """The header's metadata: a field of the record or of PEFT's configuration, or the JSON itself."""
    (model, source), target = make.source(), make.directory / "a.safetensors"
    with safe_open(source, "pt") as opened:
        metadata = dict(opened.metadata())
    key = make.chance.choice(("loraone", "loraone", "loraone", "peft_config", "peft_config", "format_version"))
    if key == "format_version" or make.chance.random() < 0.1:
        metadata[key] = str(make.chance.choice(("", "2", "null", "[]", "{}", "7" * 5000, "[" * 100_000, "\x00", "NaN")))
        what = f"{key} = {metadata[key][:20]!r}"
    else:
        metadata[key], what = odd_json(make.chance, json.loads(metadata[key]))
        what = f"{key}: {what}"
    save_file(load_file(source), target, metadata=metadata)
    return make.on_adapter(f"{source.stem}: {what}", target, model)


def _factors(make: _Maker) -> Mutant:
    """Tensors of other shapes, dtypes and names, too few or too many."""
    (model, source), target = make.source(), make.directory / "a.safetensors"
    with safe_open(source, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(source)
    name = make.chance.choice(sorted(tensors))
    tensor = tensors[name]
    odd = {
        "transposed": lambda: tensor.T.contiguous(),
        "flat": lambda: tensor.flatten(),
        "empty": lambda: tensor[:0].contiguous(),
        "scalar": lambda: tensor.sum(),
        "one row": lambda: tensor[:1].contiguous(),
        "one column": lambda: tensor[:, :1].contiguous(),
        "three dimensions": lambda: tensor[None].contiguous(),
        "int": lambda: tensor.to(torch.int32),
        "bool": lambda: tensor > 0,
        "fp64": lambda: tensor.double(),
        "fp8": lambda: tensor.to(torch.float8_e4m3fn),
        "bf16": lambda: tensor.bfloat16(),
    }
    what = make.chance.choice([*odd, "deleted", "renamed", "added"])
    if what == "deleted":
        del tensors[name]
    elif what == "renamed":
        tensors[make.chance.choice(("x", "", f"{name}.x", name.removeprefix("base_model.")))] = tensors.pop(name)
    elif what == "added":
        tensors[make.chance.choice(("x", name.replace("layers.0", "layers.7"), "base_model.model.x"))] = tensor.clone()
    else:
        tensors[name] = odd[what]()
    save_file(tensors, target, metadata=metadata)
    return make.on_adapter(f"{what} {name}", target, model)


def _adapter_bytes(make: _Maker) -> Mutant:
    content, what = odd_bytes(make.chance, make.world.adapter.read_bytes())
    target = make.directory / "a.safetensors"
    target.write_bytes(content)
    return make.on_adapter(what, target)


def _peft_directory(make: _Maker) -> Mutant:
    """A directory whose adapter_config.json is mutated."""
    target = shutil.copytree(make.world.peft, make.directory / "peft")
    file = target / "adapter_config.json"
    if make.chance.random() < 0.25:
        content, what = odd_bytes(make.chance, file.read_bytes())
        file.write_bytes(content)
    else:
        config = json.loads(file.read_text())
        if make.chance.random() < 0.3:
            name = make.chance.choice(("rank_pattern", "alpha_pattern"))
            config[name] = {make.chance.choice(("(", "*", "q_proj", "[", "x", "", "(?P<x>")): 4}
        text, what = odd_json(make.chance, config)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return make.on_adapter(what, target)


def _config(make: _Maker) -> Mutant:
    return make.on_model(*_with_odd_file(make, make.world.model, ("config.json",)))


def _tokenizer(make: _Maker) -> Mutant:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return make.on_model(*_with_odd_file(make, make.world.model, names))


def _shards(make: _Maker) -> Mutant:
    """Cut or emptied weight files, and an index that is not as it should be."""
    names = sorted(path.name for path in make.world.sharded.glob("model-*.safetensors"))[:3]
    return make.on_model(*_with_odd_file(make, make.world.sharded, (*names, *["model.safetensors.index.json"] * 4)))


def _with_odd_file(make: _Maker, source: Path, names: tuple[str, ...]) -> tuple[str, Path]:
    target = shutil.copytree(source, make.directory / "model")
    file = target / make.chance.choice(names)
    if make.chance.random() < 0.05:
        file.unlink()
        return f"{file.name} missing", target
    if file.suffix == ".json" and make.chance.random() < 0.75:
        text, what = odd_json(make.chance, json.loads(file.read_text()))
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        content, what = odd_bytes(make.chance, file.read_bytes())
        file.write_bytes(content)
    return f"{file.name}: {what}", target


_ROWS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"prompt": "w1 w2", "completion": " w3 w4"}, ()),
    ({"text": "w1 w2 w3"}, ()),
    ({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]}, ()),
    (
        {"messages": [{"role": "user", "content": "w1"}], "tools": [{"name": "w3"}], "chat_template_kwargs": {"x": 1}},
        (),
    ),
    ({"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]}, ()),
    ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, ()),
    ({"question": "w1", "answer": "w2"}, ("--columns", "prompt=question,completion=answer")),
    ({"text": "w1 w2", "label": 1}, ("--task", "sequence-classification")),
    ({"text": "w1 w2", "label": "good"}, ("--task", "sequence-classification")),
    ({"text": "w1 w2", "label": [0.5, 1]}, ("--task", "sequence-classification")),
)


def _data(make: _Maker) -> Mutant:
    """Rows with a field of another type, or a file of any of the formats that is not as it should be."""
    row, options = make.chance.choice(_ROWS)
    rows = [json.loads(json.dumps(row)) for _ in range(4)]
    if "label" in row:
        rows[0]["label"] = {int: 0, str: "bad", list: [1, 0]}[type(row["label"])]
    suffix = make.chance.choice((".jsonl", ".jsonl", ".json", ".csv", ".txt", ".parquet"))
    file = make.directory / f"rows{suffix}"
    if suffix in (".jsonl", ".json") and make.chance.random() < 0.8:
        number = make.chance.randrange(4)
        text, what = odd_json(make.chance, rows[number])
        lines = [*map(json.dumps, rows[:number]), text, *map(json.dumps, rows[number + 1 :])]
        file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    else:
        content, what = odd_bytes(make.chance, _written(file, rows))
        file.write_bytes(content)
    what = f"{suffix} of {', '.join(row)}: {what}"
    if make.chance.random() < 0.15 and not options:
        arguments = ("--adapter", make.world.adapter, "-o", make.out, *TRAINING)
        return make.mutant(what, train_command, make.world.model, file, *arguments)
    return make.mutant(what, init_command, make.world.model, file, "--dry-run", *options)


def _written(file: Path, rows: list[dict[str, Any]]) -> bytes:
    """The rows in the format that the file's suffix says."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.read_bytes()
    if file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(json.dumps(v).replace(",", "") for v in row.values()) for row in rows)]
    elif file.suffix == ".txt":
        lines = ["w1 w2 w3"] * len(rows)
    elif file.suffix == ".json":
        return json.dumps(rows).encode()
    else:
        lines = list(map(json.dumps, rows))
    return "\n".join(lines).encode()


_TEMPLATES = (
    *("{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{% if %}", "{{ raise_exception('no') }}", "{{ 'a' + 1 }}", ""),
    *("{{ range(10 ** 30) }}", "{{ ''.__class__.__mro__ }}", "{{ nothing() }}", "{{ 3 | round('x') }}", "{{ x.y }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "\x00", "{{ messages | tojson }}"),
    *("{{ 'a' * 10 ** 30 }}", "{{ '%s' % () }}", "{{ messages | sort }}", "{% for m in 3 %}{% endfor %}", "{#"),
)
_TEMPLATE_ARGUMENTS = (
    *({"return_tensors": "pt"}, {"tokenize": False}, {"padding": "max_length"}, {"chat_template": 3}, {"": 1}),
    *({"chat_template": "x"}, {"add_generation_prompt": "x"}, {"tools": 3}, {"documents": 3}, {"messages": []}, 3, "x"),
    *({"conversation": 1}, {"return_dict": False}, {"continue_final_message": True}, {"tokenizer_kwargs": 1}),
)


def _template(make: _Maker) -> Mutant:
    """Chat templates that raise, and arguments for them that mean something else."""
    chance, model = make.chance, make.world.model
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    if chance.random() < 0.5:
        row = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    if chance.random() < 0.5:
        what = repr(row.setdefault("chat_template_kwargs", chance.choice(_TEMPLATE_ARGUMENTS)))
    else:
        model = shutil.copytree(model, make.directory / "model")
        what = chance.choice(_TEMPLATES)
        (model / "chat_template.jinja").write_text(what)
    rows = make.directory / "rows.jsonl"
    rows.write_text(json.dumps(row))
    options = chance.choice(((), ("--assistant-only",), ("--all-tokens",)))
    return make.mutant(what, init_command, model, rows, "--dry-run", *options)


def _gguf(make: _Maker) -> Mutant:
    """A model in one file, cut, changed, or something else."""
    file = make.directory / "model.gguf"
    content, what = odd_bytes(make.chance, make.world.gguf.read_bytes())
    file.write_bytes(content)
    cache = {"XDG_CACHE_HOME": str(make.directory / "cache")}
    return make.mutant(what, init_command, file, make.world.rows, "--dry-run", environment=cache)


_NUMBERS = (
    *("nan", "inf", "-inf", "-1", "0", "1", "2", "1e30", str(10**30), "-1e30", "9" * 5000, "", "x", "1e-400", "1e400"),
    *("0.5", "-0.0", "٣", "1_000", "0x10", "auto", "2147483648", str(2**63), str(2**64), "total:0", "1e308", "5e-324"),
)
_TEXTS = (
    *("", " ", "(", "*", "[", "\\", ",", ",,", "a,", "\udcff", "a" * 5000, "=", "a=b", "."),
    *("prompt=prompt", "text=prompt", "prompt=prompt,completion=prompt", "/", "..", "model.layers", "model", "ä"),
    *("all-linear", "(?i)Q_PROJ", "q_proj", "(?P<x>", "{0}", "%s", "a{1000000}", "(" * 5000, "10", "-1", "8GiB", "0"),
)
_INIT_NUMBERS = (
    *("--rank", "--rank-budget", "--alpha", "--gamma", "--samples", "--max-samples", "--sample-tolerance"),
    *("--held-out", "--max-length", "--batch-size", "--batch-tokens", "--max-memory", "--seed"),
)
_INIT_TEXTS = (
    *("--target-modules", "--exclude-modules", "--columns", "--split", "--block-path", "--device", "--max-memory"),
    *("--revision", "--scaling", "--task", "--dtype", "--placement", "--rank-budget"),
)
_TRAIN_NUMBERS = (
    *("--epochs", "--max-steps", "--learning-rate", "--warmup", "--batch-size", "--accumulation", "--weight-decay"),
    *("--max-grad-norm", "--damping", "--samples", "--max-length", "--logging-steps", "--save-steps", "--seed"),
)
_TRAIN_TEXTS = ("--columns", "--split", "--eval-data", "--eval-split", "--schedule", "--precision", "--revision")


def _init_options(make: _Maker) -> Mutant:
    if make.chance.random() < 0.6:
        option, value = make.chance.choice(_INIT_NUMBERS), make.chance.choice(_NUMBERS)
    else:
        option, value = make.chance.choice(_INIT_TEXTS), make.chance.choice(_TEXTS)
    extra = ["--samples", "auto"] if option in ("--max-samples", "--sample-tolerance") else ["--samples", 4]
    if make.chance.random() < 0.2:
        extra += ["--gamma", "auto"]
    output = ["-o", make.out] if make.chance.random() < 0.4 else ["--dry-run"]
    arguments = (*output, "--target-modules", "q_proj", *extra, option, value)
    return make.mutant(f"{option} {value[:40]!r}", init_command, make.world.model, make.world.rows, *arguments)


def _train_options(make: _Maker) -> Mutant:
    if make.chance.random() < 0.8:
        option, value = make.chance.choice(_TRAIN_NUMBERS), make.chance.choice(_NUMBERS)
    else:
        option, value = make.chance.choice(_TRAIN_TEXTS), make.chance.choice(_TEXTS)
    if option == "--max-steps" and value.isdecimal() and int(value[:9]) > 2:
        value = "0"  # what is no mistake takes its time
    adapter = ("--adapter", make.world.adapter, "-o", make.out, *TRAINING)
    return make.mutant(
        f"{option} {value[:40]!r}", train_command, make.world.model, make.world.rows, *adapter, option, value
    )


def _export_options(make: _Maker) -> Mutant:
    model, adapter = make.world.model, make.world.adapter
    target, option = make.chance.choice((("onnx", "--opset"), ("onnx", "--atol"), ("merged", "--dtype")))
    value = make.chance.choice([value for value in _NUMBERS if value not in ("2", "1", "0.5", "1e30", "1e308", "inf")])
    if option == "--atol":
        value = make.chance.choice(("nan", "inf", "-1", "x", "1e400", "9" * 5000, "-inf"))  # another would export
    return make.mutant(
        f"{target} {option} {value[:40]!r}", export_command, target, model, adapter, "-o", make.out, option, value
    )


_PATHS = (
    *("", " ", ".", "..", "/", "~", "~nobody", "\udcff", "x\udcff.safetensors", "a" * 300, "a/" * 2500, "x\ny"),
    *("\x1b[31mx", "x.jsonl", "x.json", "x.gguf", "x.safetensors", "org/name", "org/name:x", "https://x.y/z", "demo:x"),
    *("{}", "%s", "*", "-", "file:///x", "a" * 300 + ".jsonl", "\udcff.jsonl", "\udcff.gguf", "x.parquet"),
)


def _arguments(make: _Maker) -> Mutant:
    """Names of files that are not there, or are none."""
    world, chance = make.world, make.chance
    path = chance.choice(_PATHS)
    if chance.random() < 0.3:
        path = str(chance.choice((world.model, world.rows, world.adapter, world.peft, world.model / "config.json")))
    commands: list[tuple[click.Command, tuple[object, ...]]] = [
        (init_command, (path, world.rows, "--dry-run")),
        (init_command, (world.model, path, "--dry-run")),
        (init_command, (world.model, world.rows, "--samples", 2, "-o", make.directory / path)),
        (inspect_command, (path,)),
        (inspect_command, (world.adapter, "--compare", path)),
        (inspect_command, (world.adapter, "--html", make.directory / path)),
        (export_command, ("merged", path, world.adapter, "-o", make.out)),
        (export_command, ("merged", world.model, path, "-o", make.out)),
        (export_command, ("peft", world.model, world.adapter, "-o", make.directory / path)),
        (train_command, (path, world.rows, "--adapter", world.adapter, "-o", make.out, *TRAINING)),
        (train_command, (world.model, path, "--adapter", world.adapter, "-o", make.out, *TRAINING)),
        (train_command, (world.model, world.rows, "--adapter", path, "-o", make.out, *TRAINING)),
        (train_command, (world.model, world.rows, "--adapter", world.adapter, "-o", make.out, "--eval-data", path)),
    ]
    number = chance.randrange(len(commands))
    command, arguments = commands[number]
    if str(path).startswith("/") and any(str(make.directory / path) == str(argument) for argument in arguments):
        command, arguments = commands[3]  # nothing is written outside of the directory
    return make.mutant(f"{number}: {path!r}", command, *arguments)


def _complete_json(make: _Maker) -> Mutant:
    """A training that is to be resumed from a checkpoint whose record is broken."""
    target = shutil.copytree(make.world.trained, make.out)
    names = ("complete.json", "complete.json", "trainer_state.json")
    file = next(target.glob("checkpoint-*")) / make.chance.choice(names)
    if make.chance.random() < 0.3:
        content, what = odd_bytes(make.chance, file.read_bytes())
        file.write_bytes(content)
    else:
        text, what = odd_json(make.chance, json.loads(file.read_text()))
        file.write_text(text)
    world = make.world
    arguments = ("--adapter", world.adapter, "-o", target, *TRAINING, "--save-steps", 1, "--resume")
    return make.mutant(f"{file.name}: {what}", train_command, world.model, world.rows, *arguments)


_VARIABLES = (
    "HOME",
    "XDG_CACHE_HOME",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "RANK",
    "TMPDIR",
    "HF_HOME",
    "COLUMNS",
    "TERM",
)


def _environment(make: _Maker) -> Mutant:
    name = make.chance.choice(_VARIABLES)
    values = (None, "", "x", "-1", "0", "1.5", "/dev/null", "~nobody", "ä", "9" * 5000)
    value = make.chance.choice(values[:-1] if name == "COLUMNS" else values)  # rich makes lines as long as it says
    world, environment = make.world, {name: value}
    what = f"{name}={str(value)[:20]}"
    arguments: tuple[click.Command, tuple[object, ...]] = make.chance.choice(
        (
            (init_command, (world.model, world.rows, "-o", make.out, "--samples", 2)),
            (init_command, ("x.gguf", world.rows, "--dry-run")),
            (inspect_command, (world.adapter,)),
            (train_command, (world.model, world.rows, "--adapter", world.adapter, "-o", make.out, *TRAINING)),
            (export_command, ("merged", world.model, world.adapter, "-o", make.out)),
        )
    )
    return make.mutant(what, arguments[0], *arguments[1], environment=environment)


KINDS: dict[str, Callable[[_Maker], Mutant]] = {
    "record": _record,
    "factors": _factors,
    "adapter bytes": _adapter_bytes,
    "PEFT directory": _peft_directory,
    "config": _config,
    "tokenizer": _tokenizer,
    "shards": _shards,
    "data": _data,
    "template": _template,
    "gguf": _gguf,
    "init options": _init_options,
    "train options": _train_options,
    "export options": _export_options,
    "arguments": _arguments,
    "complete.json": _complete_json,
    "environment": _environment,
}
