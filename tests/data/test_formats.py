"""Token ids and labels are those of TRL's SFTTrainer, row by row; what TRL fails on gets a message with the row."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from loraone_init.data.batches import IGNORED
from loraone_init.data.causal_rows import RowEncoder, row_encoder
from loraone_init.data.formats import check_columns, infer_format, parse_columns
from loraone_init.errors import ConfigError, DataError, MissingPackageError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # from inside TRL

EOS = "<|im_end|>"
SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Natalia sold clips to 48 of her friends in April, and then half as many clips in May.",
    "user system assistant tool think question answer cats catalogue",
]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if shout %}LOUD {% endif %}"
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n{% endif %}")


def make_tokenizer(chat_template: Any = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer; with `bos`, one that puts <s> before every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(SENTENCES, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=EOS, pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def tool(name: str, argument: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"}}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


PAIRS = [
    {"prompt": "What is the capital of France?", "completion": " The capital of France is Paris."},
    {"prompt": "The cat", "completion": "alogue of cats"},  # tokens merge over the border
    {"prompt": "", "completion": f"half as many clips{EOS}"},
    {"prompt": "Natalia sold clips to 48 of her friends in April", "completion": ""},
]
CHATS = [
    [said("system", "answer"), said("user", "What is the capital of France?"), said("assistant", "Paris.")],
    [said("user", "cats?"), said("assistant", "48"), said("user", "clips?"), said("assistant", "half as many in May")],
    [said("user", "Größe 🐈"), said("assistant", "")],
]
CHAT_PAIRS = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]
SHAREGPT = [
    {"conversations": [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in chat]}
    for chat in CHATS
]
CALLS = [{"type": "function", "function": {"name": "sold", "arguments": {"month": "May"}}}]
TOOL_CHATS = [
    [said("user", "clips?"), {"role": "assistant", "tool_calls": CALLS}, said("tool", "24"), said("assistant", "24.")],
    CHATS[0],
]


DROPS_NULLS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)


@dataclass(frozen=True)
class Case:
    """Rows for both, `trl_rows` where TRL does not know the format, and `options` of `row_encoder`."""

    rows: list[dict[str, Any]]
    trl_rows: list[dict[str, Any]] | None = None
    template: Any = CHATML
    bos: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "text": Case([{"text": text} for text in (*SENTENCES, f"done{EOS}", "")]),
    "text with BOS": Case([{"text": text} for text in SENTENCES], bos=True),
    "prompt-completion": Case(PAIRS),
    "prompt-completion with BOS": Case(PAIRS, bos=True),
    "prompt-completion, all tokens": Case(PAIRS, options={"completion_only": False}),
    "prompt-completion with a column text": Case(
        [{**pair, "text": text} for pair, text in zip(PAIRS, ["a", f"a{EOS}", "", "b"], strict=True)]
    ),
    "conversational prompt-completion": Case(CHAT_PAIRS),
    "conversational prompt-completion, all tokens": Case(CHAT_PAIRS, options={"completion_only": False}),
    "generation prompt that the answer does not repeat": Case(CHAT_PAIRS, template=THINKING),
    "messages": Case([{"messages": chat} for chat in CHATS]),
    "messages with BOS": Case([{"messages": chat} for chat in CHATS], bos=True),
    "messages beside text": Case([{"messages": chat, "text": "no"} for chat in CHATS]),
    "messages beside role/content conversations": Case([{"messages": c, "conversations": CHATS[0]} for c in CHATS]),
    "conversations": Case(SHAREGPT),
    "conversations beside messages": Case([{**row, "messages": CHATS[0]} for row in SHAREGPT]),
    "tool calls and a list of tools": Case([{"messages": c, "tools": [tool("sold", "month")]} for c in TOOL_CHATS]),
    "tools as JSON": Case(
        [
            {"messages": chat, "tools": json.dumps([tool(name, argument)])}
            for chat, name, argument in zip(TOOL_CHATS, ["sold", "capital"], ["month", "country"], strict=True)
        ]
    ),
    "tools and prompt-completion": Case([{**pair, "tools": [tool("sold", "month")]} for pair in CHAT_PAIRS]),
    "chat_template_kwargs": Case(
        [{"messages": chat, "chat_template_kwargs": {"shout": len(chat) > 2}} for chat in CHATS]
    ),
    "named chat templates": Case(
        [{"messages": chat, "tools": [tool("sold", "month")]} for chat in CHATS],
        template={"default": CHATML, "tool_use": THINKING.replace("LOUD", "TOOLS")},
    ),
    "assistant-only": Case(
        [{"messages": chat} for chat in CHATS], template=MARKED, options={"assistant_only": True}
    ),
    "assistant-only, conversations": Case(
        [{"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]} for chat in CHATS],
        [{"messages": chat} for chat in CHATS],  # TRL looks before it converts, and refuses
        template=MARKED,
        options={"assistant_only": True},
    ),
    "assistant-only, prompt-completion": Case(CHAT_PAIRS, template=MARKED, options={"assistant_only": True}),
    "assistant-only, prompt-completion, all tokens": Case(
        CHAT_PAIRS, template=MARKED, options={"assistant_only": True, "completion_only": False}
    ),
    "assistant-only, named chat templates": Case(
        [{"messages": chat} for chat in CHATS], template={"default": MARKED}, options={"assistant_only": True}
    ),
    "truncated text": Case([{"text": text} for text in SENTENCES], options={"max_length": 7}),
    "truncated prompt-completion": Case(PAIRS, options={"max_length": 9}),
    "truncated messages": Case([{"messages": chat} for chat in CHATS], options={"max_length": 12}),
    "truncated assistant-only": Case(
        [{"messages": chat} for chat in CHATS], template=MARKED, options={"assistant_only": True, "max_length": 20}
    ),
    "question-answer": Case(
        [{"question": pair["prompt"], "answer": pair["completion"]} for pair in PAIRS],
        [{"prompt": pair["prompt"] + "\n", "completion": pair["completion"]} for pair in PAIRS],
    ),
    "alpaca": Case(
        [
            {"instruction": "cats?", "input": "48", "output": "half"},
            {"instruction": "clips?", "input": "", "output": "many"},
            {"instruction": "April?", "input": None, "output": "May"},
        ],
        [
            {"prompt": "cats?\n48\n", "completion": "half"},
            {"prompt": "clips?\n", "completion": "many"},
            {"prompt": "April?\n", "completion": "May"},
        ],
    ),
    "renamed columns": Case(
        [{"q": pair["prompt"], "a": pair["completion"], "id": 1} for pair in PAIRS],
        PAIRS,
        options={"columns": {"prompt": "q", "completion": "a"}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    datasets = pytest.importorskip("datasets")
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers_logging.set_verbosity(before)


@pytest.fixture(scope="module")
def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=256, **sizes))


def trl_rows(case: Case, model: LlamaForCausalLM, folder: Path) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the rows that SFTTrainer trains on, in order."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    config = trl.SFTConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        shuffle_dataset=False,
        max_length=case.options.get("max_length", 1024),
        completion_only_loss=case.options.get("completion_only"),
        assistant_only_loss=case.options.get("assistant_only", False),
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(case.trl_rows or case.rows),
        processing_class=make_tokenizer(case.template, bos=case.bos),
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def our_rows(case: Case) -> list[tuple[list[int], list[int]]]:
    """Likewise, and as there without rows that are masked throughout."""
    encoder = row_encoder(case.rows[0], make_tokenizer(case.template, bos=case.bos), **case.options)
    encoded = [encoder.encode(row, number) for number, row in enumerate(case.rows, 1)]
    return [(row.input_ids, row.labels) for row in encoded if set(row.labels) != {IGNORED}]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_same_as_sft_trainer(case: Case, quiet: None, tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    if case in (CASES["tool calls and a list of tools"], CASES["tools as JSON"]) and not DROPS_NULLS:
        pytest.skip("this transformers renders the nulls that datasets puts into tool calls of unlike arguments")
    expected = trl_rows(case, tiny_model, tmp_path)
    assert expected
    assert our_rows(case) == expected


@pytest.mark.parametrize("columns", [["messages"], ["prompt", "completion"]])
def test_same_as_sft_trainer_with_a_template_that_trl_marks(
    columns: list[str], quiet: None, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    templates = pytest.importorskip("trl.chat_template_utils")
    rows = [{"messages": chat, **pair} for chat, pair in zip(CHATS, CHAT_PAIRS, strict=True)]
    rows = [{column: row[column] for column in columns} for row in rows]
    case = Case(rows, template=templates.qwen2_5_chat_template, options={"assistant_only": True})
    expected = trl_rows(case, tiny_model, tmp_path)
    assert any(IGNORED in labels for _, labels in expected)
    assert our_rows(case) == expected


def test_cases_tell_the_rules_apart() -> None:
    """What the comparison with TRL rests on: masks, EOS, BOS, merges and cuts each change the rows it compares."""
    masked, unmasked = our_rows(CASES["prompt-completion"]), our_rows(CASES["prompt-completion, all tokens"])
    assert [ids for ids, _ in masked] == [ids for ids, _ in unmasked]
    assert [labels for _, labels in masked] != [labels for _, labels in unmasked]
    assert our_rows(CASES["prompt-completion with a column text"]) != masked
    assert our_rows(CASES["text"])[0][0] == our_rows(CASES["text with BOS"])[0][0][1:]
    assert our_rows(CASES["generation prompt that the answer does not repeat"]) == our_rows(
        CASES["conversational prompt-completion"]
    )
    tokenizer = make_tokenizer()
    merged = tokenizer(text="The catalogue of cats")["input_ids"]
    assert merged[: len(tokenizer(text="The cat")["input_ids"])] != tokenizer(text="The cat")["input_ids"]
    assert len(our_rows(CASES["truncated prompt-completion"])) < len(PAIRS)


# By hand: a word is a token.

WORDS = {word: number for number, word in enumerate(["<pad>", "</s>", "?", "a", "b", "c", "d", "user", "gpt"])}


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}gpt {% endif %}"
    )
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any) -> tuple[list[int], list[int]]:
    result = row_encoder(row, tokenizer, **options).encode(row, 1)
    return result.input_ids, result.labels


@pytest.mark.parametrize(
    ("row", "input_ids", "labels"),
    [
        ({"text": "a b"}, [3, 4, 1], [3, 4, 1]),
        ({"prompt": "a b", "completion": " c"}, [3, 4, 5, 1], [-100, -100, 5, 1]),
        ({"question": "a", "answer": "b c </s>"}, [3, 4, 5, 1], [-100, 4, 5, 1]),
        ({"instruction": "a", "input": "b", "output": "c"}, [3, 4, 5, 1], [-100, -100, 5, 1]),
        ({"messages": [said("user", "a"), said("gpt", "b")]}, [7, 3, 1, 8, 4, 1], [7, 3, 1, 8, 4, 1]),
        (
            {"prompt": [said("user", "a")], "completion": [said("gpt", "b")]},
            [7, 3, 1, 8, 4, 1],
            [-100, -100, -100, -100, 4, 1],
        ),
    ],
)
def test_by_hand(words: PreTrainedTokenizerFast, row: dict[str, Any], input_ids: list[int], labels: list[int]) -> None:
    assert encoded(words, row) == (input_ids, labels)


def test_truncation_keeps_the_start(words: PreTrainedTokenizerFast) -> None:
    row = {"text": "a b c d"}
    lengths = {5: [3, 4, 5, 6, 1], 4: [3, 4, 5, 6], 1: [3]}
    for max_length, ids in lengths.items():
        result = row_encoder(row, words, max_length=max_length).encode(row, 1)
        assert (result.input_ids, result.labels, result.truncated) == (ids, ids, max_length < 5)


def test_without_eos_token_nothing_is_appended(words: PreTrainedTokenizerFast) -> None:
    words.eos_token = None
    assert encoded(words, {"text": "a b"})[0] == [3, 4]
    assert encoded(words, {"prompt": "a", "completion": " b"})[0] == [3, 4]


def test_rows_are_left_as_they_are() -> None:
    row = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    before = json.dumps(row)
    encoded(make_tokenizer(), row)
    assert json.dumps(row) == before


# Formats and columns.


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "completion", "text", "messages"], "prompt-completion"),
        (["prompt", "messages"], "messages"),
        (["conversations", "text"], "conversations"),
        (["text", "question", "answer"], "text"),
        (["instruction", "input", "output", "text"], "text"),
        (["question", "answer", "instruction", "output"], "question-answer"),
        (["instruction", "output"], "alpaca"),
    ],
)
def test_format_of_columns(columns: list[str], expected: str) -> None:
    assert infer_format(dict.fromkeys(columns, "")) == expected


def test_lists_of_messages_make_it_conversational() -> None:
    assert infer_format(CHAT_PAIRS[0]) == "conversational-prompt-completion"


def test_a_column_that_was_named_is_used(words: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a", "completion": "b", "body": "c d"}
    assert encoded(words, row, columns={"text": "body"})[0] == [5, 6, 1]


def test_columns_can_be_swapped(words: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a ", "completion": "b "}
    assert encoded(words, row, columns={"prompt": "completion", "completion": "prompt"})[0] == [4, 3, 1]


def test_parse_columns() -> None:
    assert parse_columns("prompt=question, completion = answer") == {"prompt": "question", "completion": "answer"}
    assert parse_columns("text=a=b") == {"text": "a=b"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("", "expected name=column"),
        ("prompt", "'prompt'; expected name=column"),
        ("prompt=", "expected name=column"),
        ("=question", "expected name=column"),
        ("prompt=a,,text=b", "has ''"),
        ("prompt=a,prompt=b", "names 'prompt' twice"),
    ],
)
def test_parse_columns_refuses(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_columns(option)


def test_check_columns() -> None:
    check_columns({"tools": "x"})
    check_columns({"label": "x", "text_pair": "y"}, "sequence-classification")
    with pytest.raises(
        ConfigError, match="cannot name 'answer'; expected one of text, prompt, completion, messages, tools"
    ):
        check_columns({"answer": "x"})
    with pytest.raises(ConfigError, match="cannot name 'prompt'; expected one of text, text_pair, label"):
        check_columns({"prompt": "x"}, "sequence-classification")


# Errors.


def refusal(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> str:
    """The message for the last of the rows, or for all."""
    with pytest.raises(DataError) as caught:
        row_encoder(rows[0], tokenizer or make_tokenizer(), **options).encode(rows[-1], len(rows))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("row", [{"prompt": "a", "title": "b"}, {"title": "b"}, {}])
def test_no_known_format(row: dict[str, Any]) -> None:
    message = refusal([row])
    assert (", ".join(row) or "no columns") in message
    assert "prompt + completion, conversations, messages, text, question + answer, instruction + output" in message
    assert '`columns={"prompt": "question", "completion": "answer"}`' in message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a"}, {"title": "b"}], "row 2 has no column 'text'; it has title"),
        ([{"text": "a"}, {"text": None, "id": 1}], "row 2: column 'text' is null, expected a string; the row has text"),
        ([{"text": 3}], "row 1: column 'text' is number, expected a string"),
        ([{"prompt": "a", "completion": None}], "column 'completion' is null"),
        ([{"question": "a", "answer": "b"}, {"question": "a"}], "row 2 has no column 'answer'; it has question"),
        ([{"instruction": "a", "output": "b", "input": 3}], "column 'input' is number"),
        ([{"messages": "hello"}], "column 'messages' is string, expected a list of messages"),
        ([{"messages": ["hello"]}], "a message that is string; expected role and content"),
        ([{"messages": [{"content": "a"}]}], "a message that is content; expected role and content"),
        ([CHAT_PAIRS[0], PAIRS[0]], "row 2: column 'prompt' is string, expected a list of messages"),
        ([PAIRS[0], CHAT_PAIRS[0]], "row 2: column 'prompt' is list, expected a string"),
        ([{**CHAT_PAIRS[0], "completion": "a"}], "column 'completion' is string, expected a list of messages"),
        ([{"messages": CHATS[0], "tools": "{"}], "row 1: column 'tools' is not JSON"),
        ([{"messages": CHATS[0], "tools": 3}], "column 'tools' is number, expected a list"),
        ([{"messages": CHATS[0], "chat_template_kwargs": "x"}], "column 'chat_template_kwargs' is string"),
    ],
)
def test_row_that_does_not_fit(rows: list[dict[str, Any]], expected: str) -> None:
    assert expected in refusal(rows)


def test_renamed_column_that_is_missing() -> None:
    message = refusal([{"body": "a"}, {"title": "b"}], columns={"text": "body"})
    assert message == "row 2 has no column 'body', which `columns` takes as 'text'; it has title"


def test_chat_template_that_fails() -> None:
    template = "{{ raise_exception('roles must alternate\nuser, assistant') }}"
    assert refusal([{"messages": CHATS[0]}], make_tokenizer(template)) == (
        "row 1 cannot be tokenised: roles must alternate user, assistant"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ messages[99].content.x }}", "has no element 99"),
        ("{{ range(10 ** 30) }}", "too large"),
    ],
)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_chat_template_that_cannot_be_run(template: str, reason: str, assistant_only: bool) -> None:
    """Templates are programs, which raise anything."""
    if assistant_only:
        template = f"{{% generation %}}{template}{{% endgeneration %}}"
    message = refusal([{"messages": CHATS[0]}], make_tokenizer(template), assistant_only=assistant_only)
    assert message.startswith("row 1 cannot be tokenised: ")
    assert reason.lower() in message.lower()


@pytest.mark.parametrize("name", ["tokenize", "return_tensors", "padding", "max_length", "return_dict"])
def test_arguments_that_are_none_of_the_template(name: str) -> None:
    message = refusal([{"messages": CHATS[0], "chat_template_kwargs": {name: 1}}])
    assert message.startswith(f"row 1: column 'chat_template_kwargs' has {name}, which says how to tokenise;")


def test_text_that_is_no_unicode() -> None:
    assert "row 1 cannot be tokenised" in refusal([{"text": "\ud800"}])


@pytest.mark.parametrize("row", [{"messages": CHATS[0]}, CHAT_PAIRS[0], SHAREGPT[0]])
def test_no_chat_template(row: dict[str, Any]) -> None:
    assert "no chat template; use a model that has one" in refusal([row], make_tokenizer(None))


@pytest.mark.parametrize("row", [{"text": "a"}, {"messages": CHATS[0]}, SHAREGPT[0]])
def test_completion_only_without_completion(row: dict[str, Any]) -> None:
    assert "`completion_only` needs a completion" in refusal([row], completion_only=True)


@pytest.mark.parametrize("row", [{"text": "a"}, PAIRS[0], {"question": "a", "answer": "b"}])
def test_assistant_only_without_conversation(row: dict[str, Any]) -> None:
    assert "`assistant_only` needs conversational data" in refusal([row], assistant_only=True)


def test_assistant_only_row_without_assistant() -> None:
    rows = [{"messages": CHATS[0]}, {"messages": [said("user", "a")]}]
    assert "row 2 has no assistant tokens" in refusal(rows, make_tokenizer(MARKED), assistant_only=True)


def test_assistant_only_with_a_template_that_trl_does_not_know() -> None:
    pytest.importorskip("trl")
    message = refusal([{"messages": CHATS[0]}], assistant_only=True)
    assert "{% generation %}" in message
    assert "nor has TRL one" in message


def test_assistant_only_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    with pytest.raises(MissingPackageError, match=r"generation %} markers, needs trl, .* \"\.\[assistant\]\""):
        row_encoder({"messages": CHATS[0]}, make_tokenizer(), assistant_only=True)
    marked = row_encoder({"messages": CHATS[0]}, make_tokenizer(MARKED), assistant_only=True)
    assert isinstance(marked, RowEncoder)
