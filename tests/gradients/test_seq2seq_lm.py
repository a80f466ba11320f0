"""Encoder-decoders: gradients, rows, the adapter in PEFT, the command."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.architectures import SEQ2SEQ_CONFIGS, make_pair_tokenizer, make_seq2seq
from support.causal import make_word_tokenizer, reference_gradients, relative_error
from support.commands import Command, Refused
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from loraone_init import Adapter, DataOptions, InitConfig, initialize, load_batches, open_model
from loraone_init.errors import DataError
from loraone_init.gradients.seq2seq_lm import Seq2SeqLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.initialization.estimate import estimate_memory
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.disk import DiskStore

EXACT = 1e-10
"""fp64 on both sides; what is left is the order of summation."""

FP32_INSIDE = 1e-6
"""T5's layer norm and softmax compute in fp32, on both sides."""

FP32 = 1e-5

CPU = torch.device("cpu")


def tolerance(name: str) -> float:
    return FP32_INSIDE if name.startswith("t5") else EXACT


def make_pairs(lengths=((9, 4), (6, 7)), rows=2):
    """Batches with padding on both sides in the last row; labels as long as the second number says."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for length, target in lengths:
        ids, labels = (torch.randint(3, 97, (rows, n), generator=generator) for n in (length, target))
        mask = torch.ones_like(ids)
        ids[-1, -2:], mask[-1, -2:], labels[-1, -1:] = 0, 0, -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def reference_loss(model, batches):
    """Mean over all label tokens of the batches together, from the logits that the model gives for its labels."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        logits = model(**batch, use_cache=False).logits
        total = total + cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        count += int((batch["labels"] != -100).sum())
    return total / count


@pytest.mark.parametrize("name", SEQ2SEQ_CONFIGS)
def test_equals_whole_model_autograd(name):
    model, batches = make_seq2seq(name).requires_grad_(False), make_pairs()
    opened, targets = open_module(model), select_targets(model, "all-linear")
    losses, gradients = stream_gradients(BlockStack.of(opened), targets, Seq2SeqLM(model, CPU), batches)
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    assert len(opened.blocks) == 5  # two of the encoder, three of the decoder
    assert {n: relative_error(found[n], truth[n]) < tolerance(name) for n in targets} == dict.fromkeys(targets, True)
    mean = sum(float(rows.sums.sum()) for rows in losses) / sum(float(rows.counts.sum()) for rows in losses)
    assert mean == pytest.approx(reference_loss(model, batches).item(), rel=tolerance(name))


def test_gradient_of_the_encoder_comes_from_all_decoder_blocks():
    """Negative control: without what the first decoder block passes back, the encoder's gradient is another one."""
    model, batches = make_seq2seq("bart"), make_pairs()
    targets = select_targets(model, r"model\.encoder\..*")
    whole = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    hook = model.model.decoder.layers[0].encoder_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "key_value_states": kwargs["key_value_states"].detach()}),
        with_kwargs=True,
    )
    without = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    hook.remove()
    assert min(relative_error(without[name], whole[name]) for name in targets) > 0.01


def test_head_chunks_do_not_change_the_loss(monkeypatch):
    model, batches = make_seq2seq("mbart").requires_grad_(False), make_pairs()
    monkeypatch.setattr("loraone_init.gradients.causal_lm.MAX_LOGITS", 3 * 97)  # three tokens at a time
    adapter = initialize(model, batches, InitConfig(rank=4, gamma=64.0))
    assert adapter.loss.sample == pytest.approx(reference_loss(model, batches).item(), rel=EXACT)


@pytest.fixture(scope="module", params=["t5", "bart"])
def case(request, tmp_path_factory):
    """(directory of the model, adapter made with the blocks on disk)."""
    directory = tmp_path_factory.mktemp(request.param)
    make_seq2seq(request.param, torch.float32).save_pretrained(directory)
    opened = open_model(str(directory), task="seq2seq-lm")
    assert isinstance(opened.store, DiskStore)
    return directory, initialize(opened, make_pairs(), InitConfig(rank=4, gamma=64.0))


def test_blocks_on_disk_give_the_adapter_of_a_model_in_memory(case):
    directory, adapter = case
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    in_memory = initialize(model, make_pairs(), InitConfig(rank=4, gamma=64.0))
    assert all(torch.equal(pair.B, in_memory.pairs[name].B) for name, pair in adapter.pairs.items())
    assert adapter.loss == in_memory.loss


def test_loss_after_the_step_is_that_of_the_model_with_the_adapter(case):
    """Of four rows one is evaluated."""
    directory, adapter = case
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in make_pairs() for i in range(2)]
    with torch.no_grad():
        before = [reference_loss(model, [row]).item() for row in rows]
        with applied(adapter.pairs, select_targets(model, "all-linear"), adapter.config.scale):
            after = [reference_loss(model, [row]).item() for row in rows]
    chosen = min(range(4), key=lambda row: abs(before[row] - adapter.loss.before))
    assert adapter.loss.before == pytest.approx(before[chosen], rel=FP32)
    assert adapter.loss.after == pytest.approx(after[chosen], rel=FP32)
    assert adapter.loss.after != adapter.loss.before


def test_peft_computes_the_same_logits(case, tmp_path):
    directory, adapter = case
    adapter.save(tmp_path / "peft")
    batch = make_pairs()[0]
    base = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad(), applied(adapter.pairs, select_targets(base, "all-linear"), adapter.config.scale):
        ours = base(**batch).logits
    with torch.no_grad():
        plain = base(**batch).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()(**batch).logits
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    torch.testing.assert_close(ours, theirs, rtol=FP32, atol=FP32)
    assert (plain - theirs).abs().max() > 100 * FP32


# The rows.

PAIRS = [
    {"prompt": "w1 w2 w3", "completion": "w4 w5"},
    {"prompt": "w6 w7 w8 w9 w10 w11", "completion": "w12"},
    {"prompt": "w13", "completion": "w14 w15 w16 w17 w18 w19"},
]
OPTIONS = DataOptions(task="seq2seq-lm", max_length=5)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return file


def test_batches_are_those_of_transformers_collator(pairs_file):
    """As transformers' own summarisation example makes them, each side cut by itself with its special tokens kept."""
    tokenizer = make_pair_tokenizer()
    sample = load_batches(str(pairs_file), tokenizer, OPTIONS)
    (batch,) = sample.batches
    rows = []
    for row in PAIRS:
        encoded = tokenizer(row["prompt"], max_length=5, truncation=True, return_token_type_ids=False)
        target = tokenizer(text_target=row["completion"], max_length=5, truncation=True)
        rows.append({**encoded, "labels": target["input_ids"]})
    rows.sort(key=lambda row: (len(row["input_ids"]), len(row["labels"])))
    theirs = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {n: t.tolist() for n, t in theirs.items()}
    assert (sample.format, sample.rows_truncated, sample.rows_dropped) == ("prompt-completion", 2, 0)
    assert (sample.num_tokens, sample.num_label_tokens) == (5 + 5 + 3, 4 + 3 + 5)


def test_digest_by_hand(pairs_file):
    sample = load_batches(str(pairs_file), make_word_tokenizer(), DataOptions(task="seq2seq-lm", samples=1))
    (row,) = sample.rows
    source, target = row.input_ids, row.labels
    layout = struct.pack(f"<{2 + len(source) + len(target)}q", len(source), *source, len(target), *target)
    assert sample.sha256 == hashlib.sha256(layout).hexdigest()


def test_rows_of_unlike_targets_are_not_padded_to_each_other(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "w1 " * 10, "completion": "w2 " * length} for length in (5, 40, 42)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = load_batches(str(file), make_word_tokenizer(), DataOptions(task="seq2seq-lm")).batches
    assert [tuple(batch["labels"].shape) for batch in batches] == [(1, 5), (2, 42)]
    limited = load_batches(str(file), make_word_tokenizer(), DataOptions(task="seq2seq-lm", batch_tokens=103)).batches
    assert [len(batch["labels"]) for batch in limited] == [1, 1, 1]  # two rows would be 104 tokens


def test_text_alone_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "w1 w2"}\n')
    with pytest.raises(
        DataError, match=r"needs prompts and completions as strings, but the format is text; .*`columns="
    ):
        load_batches(str(file), make_word_tokenizer(), OPTIONS)


# The command.


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("t5")
    make_seq2seq("t5", torch.float32).save_pretrained(directory)
    make_pair_tokenizer().save_pretrained(directory)
    return directory


def test_command(command: Command, t5: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = command(t5, tiny_data, "--task", "seq2seq-lm", "-o", tmp_path / "peft", "--json", "--gamma", 1000)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["loss"]["after"] < found["loss"]["before"]
    assert list(found["trainers"]) == ["PEFT"]
    assert f'AutoModelForSeq2SeqLM.from_pretrained("{t5}")' in found["trainers"]["PEFT"]
    assert f'AutoModelForSeq2SeqLM.from_pretrained("{t5}")' in (tmp_path / "peft" / "README.md").read_text()
    assert Adapter.load(tmp_path / "peft").task_type == "SEQ_2_SEQ_LM"
    names = {}
    exec(found["trainers"]["PEFT"], names)
    assert len(list(names["model"].parameters())) > 2 * found["layers"]


def test_gamma_is_searched_for_with_rows_held_out(command: Command, t5: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = ("--task", "seq2seq-lm", "--json", "--gamma", "auto", "--samples", 8, "--held-out", 4)
    result = command(t5, tiny_data, *options, "-o", tmp_path / "peft")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    losses = {gamma: loss for gamma, loss in found["loss"]["curve"]}
    assert found["loss"]["after"] == losses[found["gamma"]] == min(losses.values())
    assert (found["loss"]["rows"], found["sample"]["rows_held_out"]) == (4, 4)


def test_dry_run_counts_what_decoder_blocks_read(command: Command, t5: Path, tiny_data: Path) -> None:
    result = command(t5, tiny_data, "--task", "seq2seq-lm", "--dry-run", "--json", "--schedule", "blocks")
    memory = json.loads(result.stdout)["memory_bytes"]
    opened = open_model(str(t5), task="seq2seq-lm", weights=False)
    sample = load_batches(str(tiny_data), opened.tokenizer, DataOptions(task="seq2seq-lm"))
    tokens = 2 * sum(batch["input_ids"].numel() for batch in sample.batches)
    tokens += 3 * sum(batch["labels"].numel() for batch in sample.batches)
    assert memory["inputs"] == 32 * 4 * tokens
    assert (
        estimate_memory(opened, select_targets(opened.module, "all-linear"), sample.batches).inputs == memory["inputs"]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "is an encoder-decoder; use --task seq2seq-lm, or sequence-classification"),
        (["--task", "seq2seq-lm", "--all-tokens"], "completion_only is for causal language models, not for seq2seq-lm"),
        (["--task", "seq2seq-lm", "--assistant-only"], "assistant_only is for causal language models, not for seq2seq"),
        (["--task", "seq2seq-lm", "--columns", "prompt=source"], "row 1 has no column 'source'"),
    ],
)
def test_what_does_not_go_together(options: list[str], expected: str, t5: Path, refused: Refused) -> None:
    assert expected in refused(*options, model=t5)


def test_causal_model_for_an_encoder_decoder(refused: Refused) -> None:
    assert "is no encoder-decoder; use --task causal-lm" in refused("--task", "seq2seq-lm")
