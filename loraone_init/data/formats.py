"""What a row of data means: its format, told by its columns, and its prompt and completion.

The columns of the first row, after the renames of `columns`, give the format of all. First match wins:

    prompt + completion      strings, or lists of messages
    conversations            a list of {from, value} or {role, content}
    messages                 a list of {role, content, ...}
    text                     a string
    question + answer        as prompt = question, newline; completion = answer
    instruction + output     Alpaca: prompt = instruction, newline, [input, newline]; completion = output

The last two are this project's; the others are read as TRL 1.x reads them. For classifiers, see
`classification_rows`. `tools` (a list, or JSON of one) and
`chat_template_kwargs` go to the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..errors import ConfigError, DataError
from ..json_files import JsonError, json_type, parse_json
from ..tasks import Task
from .rows import Row

Format = Literal[
    "prompt-completion",
    "conversational-prompt-completion",
    "conversations",
    "messages",
    "text",
    "question-answer",
    "alpaca",
    "text-label",
    "text-pair-label",
]

TARGETS = ("text", "prompt", "completion", "messages", "tools")
CLASSIFICATION_TARGETS = ("text", "text_pair", "label")
"""The columns that `columns` can make of others."""

_NEEDED: dict[Format, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "conversational-prompt-completion": ("prompt", "completion"),
    "conversations": ("conversations",),
    "messages": ("messages",),
    "text": ("text",),
    "question-answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
}
CONVERSATIONAL = ("conversational-prompt-completion", "conversations", "messages")
WITHOUT_COMPLETION = ("conversations", "messages", "text")

Message = dict[str, Any]
Content = str | list[Message]


def infer_format(row: Row, columns: Mapping[str, str] | None = None) -> Format:
    """The format of a row (renamed already) by its columns; it must use those that `columns` names.

    Raises DataError where none fits.
    """
    named = set(columns or ()) - {"tools"}
    fitting = [name for name, needed in _NEEDED.items() if named <= set(needed) <= row.keys()]
    if not fitting:
        known = ", ".join(" + ".join(needed) for needed in dict.fromkeys(_NEEDED.values()))
        raise DataError(
            f"no known format: row 1 has the columns {_names(row)}; expected one of: {known}; rename columns with "
            '`columns`, such as `columns={"prompt": "question", "completion": "answer"}`'
        )
    if fitting[0] == "prompt-completion" and isinstance(row["prompt"], list):
        return "conversational-prompt-completion"
    if fitting[:2] == ["conversations", "messages"] and not _is_from_value(row["conversations"]):
        return "messages"  # TRL knows `conversations` only as from/value
    return fitting[0]


def parse_columns(option: str) -> dict[str, str]:
    """prompt=question,completion=answer, as the command line takes it → {"prompt": "question", ...}.

    Raises ConfigError for anything else; whether the new names are any good, `check_columns` tells.
    """
    columns: dict[str, str] = {}
    for item in option.split(","):
        target, equals, source = (part.strip() for part in item.partition("="))
        if not (target and equals and source):
            raise ConfigError(f"`columns` has {item.strip()!r}; expected name=column, such as prompt=question")
        if target in columns:
            raise ConfigError(f"`columns` names {target!r} twice, for {columns[target]!r} and {source!r}")
        columns[target] = source
    return columns


def check_columns(columns: Mapping[str, str], task: Task = "causal-lm") -> None:
    """Raises ConfigError where a new name is none that a row for `task` has."""
    classified = task == "sequence-classification"
    known, example = (CLASSIFICATION_TARGETS, {"text": "sentence"}) if classified else (TARGETS, {"prompt": "question"})
    for target in columns:
        if target not in known:
            raise ConfigError(
                f"`columns` cannot name {target!r}; expected one of {', '.join(known)}, such as `columns={example}`"
            )


def rename_columns(row: Row, columns: Mapping[str, str], number: int) -> Row:
    for target, source in columns.items():
        if source not in row:
            raise DataError(
                f"row {number} has no column {source!r}, which `columns` takes as {target!r}; it has {_names(row)}"
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {target: row[source] for target, source in columns.items()}


def prompt_and_whole(row: Row, found: Format, number: int, eos: str | None) -> tuple[Content | None, Content]:
    """The prompt, None where the format has none, and all of the row's content, the prompt included.

    Both may be empty, as a string or a list of messages: such a row has nothing to train on, and is dropped.
    """
    if found == "text":
        return None, _with_eos(string_of(row, "text", number), eos)
    if found in ("messages", "conversations"):
        return None, _messages(row, found, number)
    if found == "conversational-prompt-completion":
        messages = _messages(row, "prompt", number)
        return messages, messages + _messages(row, "completion", number)
    prompt, completion = prompt_and_completion(row, found, number)
    text = row.get("text")
    if isinstance(text, str) and eos is not None and not text.endswith(eos):
        return prompt, prompt + completion  # TRL gives the EOS to a column `text`, used or not, and only there
    return prompt, prompt + _with_eos(completion, eos)


def prompt_and_completion(row: Row, found: Format, number: int) -> tuple[str, str]:
    """The prompt and the completion of a row, in the formats that have both as strings."""
    if found == "question-answer":
        return string_of(row, "question", number) + "\n", string_of(row, "answer", number)
    if found == "alpaca":
        prompt = string_of(row, "instruction", number) + "\n"
        if row.get("input"):
            prompt += string_of(row, "input", number) + "\n"
        return prompt, string_of(row, "output", number)
    return string_of(row, "prompt", number), string_of(row, "completion", number)


def _with_eos(text: str, eos: str | None) -> str:
    """A tokenizer without an EOS token adds none."""
    return text if eos is None or text.endswith(eos) else text + eos


def string_of(row: Row, column: str, number: int) -> str:
    value = value_of(row, column, number)
    if not isinstance(value, str):
        raise wrong_type(row, column, number, "a string")
    return value


def _messages(row: Row, column: str, number: int) -> list[Message]:
    value = value_of(row, column, number)
    if not isinstance(value, list):
        raise wrong_type(row, column, number, "a list of messages")
    for message in value:
        if not isinstance(message, dict) or not ("role" in message or {"from", "value"} <= message.keys()):
            raise DataError(
                f"row {number}: column {column!r} has a message that is {_names(message)}; expected role and content"
            )
    return [_as_message(message) for message in value]


def _as_message(message: Message) -> Message:
    """from/value renamed to role/content. The role itself stays ("human", "gpt"), as in TRL."""
    names = {} if "role" in message else {"from": "role", "value": "content"}
    return {names.get(name, name): value for name, value in message.items()}


def tools_of(row: Row, number: int) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except JsonError as error:
            raise DataError(f"row {number}: column 'tools' is not JSON: {error}") from error
    if not isinstance(tools, list | None):
        raise wrong_type(row, "tools", number, "a list, or a list as JSON")
    return tools


def value_of(row: Row, column: str, number: int) -> Any:
    if column not in row:
        raise DataError(f"row {number} has no column {column!r}; it has {_names(row)}")
    return row[column]


def wrong_type(row: Row, column: str, number: int, expected: str) -> DataError:
    return DataError(
        f"row {number}: column {column!r} is {json_type(row[column])}, expected {expected}; the row has {_names(row)}"
    )


def _names(row: object) -> str:
    return ", ".join(map(str, row)) or "no columns" if isinstance(row, dict) else json_type(row)


def _is_from_value(messages: object) -> bool:
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and {"from", "value"} <= first.keys()
