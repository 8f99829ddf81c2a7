"""Scores: what counts as right, and the command that writes them."""

from __future__ import annotations

import io
import json

import pytest
import yaml
from run_scripts import command
from small_runs import whole_run
from tiny_models import tiny_model

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.post_training.chat import SPECIAL_TOKENS, render
from moe_gpt.post_training.scores import Answer, Examiner, format_scores, share
from moe_gpt.post_training.tools import calculate

SUM = [
    {"role": "user", "content": "What is 2*3?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "calculator", "arguments": {}}}]},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "It is 6."},
]
SUM[1]["tool_calls"][0]["function"]["arguments"]["expression"] = "2*3"
FUNCTION = [
    {"role": "user", "content": "Which parameters?\ndef f(a): pass"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "Which name?"},
    {"role": "assistant", "content": "f"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """A small one, grown."""
    return train_tokenizer(["the user asks the assistant\n" * 20], 300).with_special_tokens(SPECIAL_TOKENS)


class Told(Examiner):
    """Asks nobody: it is told the answers, turn by turn."""

    def __init__(self, tokenizer, first, second, has_ended=True):
        super().__init__(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, 0.05)
        self.turns, self.has_ended, self.prompts = [first, second], has_ended, []

    def _held_out(self, kind):
        return [SUM if kind == "calculator" else FUNCTION]

    def _answer(self, prompts):
        self.prompts += prompts
        turn = self.turns[len(self.prompts) - 1]
        ids = turn if isinstance(turn, list) else self._tokenizer.encode(turn)
        return [Answer(prompts[0], ids, self.has_ended)]


def called(tokenizer, expression, name="calculator"):
    """Return the tokens of a call."""
    call = {"function": {"name": name, "arguments": {"expression": expression}}}
    ids, is_answer = render([{"role": "assistant", "content": "", "tool_calls": [call]}], tokenizer)
    return [token for token, learned in zip(ids, is_answer, strict=True) if learned][:-1]


@pytest.mark.parametrize(
    ("expression", "name", "reply", "scores"),
    [
        ("2*3", "calculator", "It is 6.", (1, 1)),
        ("2*3", "calculator", "It is 7.", (1, 0)),
        ("3*2", "calculator", "It is 6.", (0, 1)),
        ("2*4", "calculator", "It is 6.", (0, 0)),
        ("2*3", "search", "It is 6.", (0, 0)),
    ],
)
def test_an_answer_counts_after_a_call_of_its_own(tokenizer, expression, name, reply, scores):
    """A right number without the result of a call is a guess."""
    told = Told(tokenizer, called(tokenizer, expression, name), reply)
    found = told.examine(["calculator", "calculator"])
    assert (found["tool_call"].score, found["own_answer"].score) == scores
    assert found["stops"].score == 1


def test_a_call_that_does_not_end_is_not_right(tokenizer):
    """The model would go on."""
    found = Told(tokenizer, called(tokenizer, "2*3"), "It is 6.", has_ended=False).examine(["calculator"])
    assert (found["stops"].score, found["tool_call"].score) == (0, 0)


def test_the_second_turn_follows_the_models_own_first_answer(tokenizer):
    """As in a conversation; each is right exactly or not at all."""
    told = Told(tokenizer, "b", "f")
    found = told.examine(["functions"])
    assert (found["parameters"].score, found["second_turn_name"].score) == (0, 1)
    own = [FUNCTION[0], {"role": "assistant", "content": "b"}, FUNCTION[2]]
    assert told.prompts[1] == render(own, tokenizer, add_generation_prompt=True).ids


def test_answers_are_texts_with_their_turns(tokenizer):
    """Of a call the right one is spelled out; the second prompt of a sum is the result of the model's own call."""
    first, second = Told(tokenizer, called(tokenizer, "2*4"), "It is 8.").answers(["calculator"], 8)
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "2*%s"}}</tool_call>'
    assert first == {
        "task": "calculator", "turn": 1, "prompt": "What is 2*3?", "expected": call % 3, "answer": call % 4,
    }  # fmt: skip
    own = {"prompt": "(the result of its own call)", "expected": "It is 6.", "answer": "It is 8."}
    assert second == {"task": "calculator", "turn": 2, **own}
    turns = Told(tokenizer, "b", "f").answers(["functions"], 8)
    assert [(turn["prompt"], turn["expected"], turn["answer"]) for turn in turns] == [
        ("Which parameters?\ndef f(a): pass", "a", "b"), ("Which name?", "f", "f"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_context_without_room_for_a_question_gives_no_score(tokenizer):
    """Nothing is divided by none."""
    assert Examiner(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, 0.05).examine(["calculator"]) == {}


@pytest.mark.slow
def test_an_untrained_model_is_right_nowhere(tokenizer):
    """Through the engine."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    found = Examiner(model, tokenizer, 0.05).examine(["calculator"])
    assert found["tool_call"].n == 256
    assert found["tool_call"].score == found["own_answer"].score == 0


def test_standard_error_of_a_share():
    """By hand: sqrt(0.25 · 0.75 / 4)."""
    assert share([True, False, False, False]) == pytest.approx((0.25, 4, 0.2165), abs=1e-4)


def test_the_calculator_takes_whole_numbers_and_refuses_the_rest():
    """Nothing is evaluated but a sum."""
    assert [calculate(text) for text in ("12*7", " -7//2 ", "7%4+1")] == ["84", "-4", "4"]
    for text in ("9**9**9", "True+1", "1/2", "1.5", "abs(1)", "()", "", "1//0", "(" * 60 + "1", "9" * 65, "é"):
        assert calculate(text).startswith("error: ")


@pytest.fixture
def chat_yaml(small_config, small_values, tmp_path):
    """A config of a stage, and the base run for it."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    values = {key: small_values[key] for key in ("train", "checkpoint")}
    values["data"] = {"cache_dir": small_values["data"]["cache_dir"]}
    values["sft"] = {"row_tokens": 64, "sources": [{"name": "own", "files": str(rows)}]}
    values["schedule"] = {"stages": [{"until_tokens": 1024, "seq_len": 64, "batch_tokens": 256}]}
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path, whole_run(small_config)


def test_finetune_writes_scores_and_says_what_was_forgotten(chat_yaml, tmp_path):
    """And a resumed, finished run keeps the scores before it."""
    config, base = chat_yaml
    done = command("finetune", config, "--init-from", base, "--run-dir", tmp_path / "run", "--max-steps", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 conversations, " in done.stdout
    assert "loss on held-out prose, nats: " in done.stdout
    values = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert values["stage"] == "sft"
    assert values["before"] == values["after"] == {}
    assert values["answers_before"] == values["answers_after"] == []
    assert set(values["forgetting"]["before"]) == {"prose", "code"}
    done = command("finetune", config, "--run-dir", tmp_path / "run", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    again = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert again["forgetting"]["before"] == values["forgetting"]["before"]
    assert again["forgetting"]["after"] != values["forgetting"]["after"]


def test_only_a_model_that_chats_is_asked_with_a_search(chat_yaml):
    """And only about held-out text."""
    done = command("evaluate", chat_yaml[1], "--retrieval")
    assert done.returncode == 2
    assert "questions on functions need a model with a chat template" in done.stderr
    done = command("evaluate", chat_yaml[1], "--retrieval", "--files", "x")
    assert done.returncode == 2
    assert "--retrieval is for held-out text, and cannot be used with --files" in done.stderr


def test_train_and_finetune_refuse_each_others_configs(chat_yaml, small_yaml, tmp_path):
    """With the command to use instead."""
    done = command("train", chat_yaml[0], "--init-from", chat_yaml[1], "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "has the section sft, which moe-gpt finetune reads" in done.stderr
    done = command("finetune", small_yaml, "--init-from", chat_yaml[1], "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "must have a section of a stage, such as sft, reward, dpo, rl, see; or use moe-gpt train" in done.stderr


def test_an_exported_chat_run_has_its_template_its_end_and_its_padding(chat_yaml, tmp_path):
    """As transformers reads them: the same ids, and two tokens that end a text."""
    from transformers import AutoTokenizer, GenerationConfig

    config, base = chat_yaml
    command("finetune", config, "--init-from", base, "--run-dir", tmp_path / "run", "--max-steps", "1")
    done = command("export", tmp_path / "run", tmp_path / "folder")
    assert (done.returncode, done.stderr) == (0, "")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|pad|>")
    ids = theirs.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|pad|>"])
    generation = GenerationConfig.from_pretrained(tmp_path / "folder")
    assert [*generation.eos_token_id, generation.pad_token_id] == ids
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    from moe_gpt.training.saving.saved_model import load_model

    assert found == render(messages, load_model(tmp_path / "run").tokenizer).ids
    assert "generation" in (tmp_path / "folder" / "chat_template_training.jinja").read_text()
    assert "generation %" not in (tmp_path / "folder" / "chat_template.jinja").read_text()
    again = command("finetune", config, "--init-from", tmp_path / "folder", "--run-dir", tmp_path / "next")
    assert (again.returncode, again.stderr) == (0, "")
    assert "forgetting is not measured" in again.stdout


def test_the_server_finds_a_chat_runs_template(chat_yaml, tmp_path):
    """And that of its quantised folder; a base run has none."""
    from moe_gpt.api.chatting import find_template
    from moe_gpt.api.loaded import load

    config, base = chat_yaml
    command("finetune", config, "--init-from", base, "--run-dir", tmp_path / "run", "--max-steps", "1")
    run = load(tmp_path / "run")
    template = find_template(run, tmp_path / "run")
    messages = [{"role": "user", "content": "x<|im_end|>"}]
    assert template.encode([("user", "x<|im_end|>")]) == render(messages, run.tokenizer, True).ids
    assert find_template(load(base), base) is None
    done = command("export", tmp_path / "run", tmp_path / "small", "--quantize", "int8")
    assert (done.returncode, done.stderr) == (0, "")
    assert find_template(load(tmp_path / "small"), tmp_path / "small").source == template.source
    assert all(run.tokenizer.special_id(token) is not None for token in SPECIAL_TOKENS)


def test_the_command_talks_to_a_chat_run_and_to_no_base_run(chat_yaml, tmp_path, monkeypatch):
    """For a message, and for lines, with what may be typed between them."""
    config, base = chat_yaml
    command("finetune", config, "--init-from", base, "--run-dir", tmp_path / "run", "--max-steps", "1")
    options = ("--max-new-tokens", "3", "--top-k", "5", "--temperature", "1", "--seed", "2")
    done = command("chat", tmp_path / "run", "--message", "a", "--tools", "calculator", *options)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n/reset\n/what\n\nb\n/quit\nc\n"))
    talk = command("chat", tmp_path / "run", *options)
    assert (talk.returncode, talk.stdout.count("\n")) == (0, 2)
    assert talk.stderr.splitlines()[-2:] == ["forgotten", "there are /reset, /image FILE and /quit, got /what"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'a b ' * 500}\nb\n"))
    talk = command("chat", tmp_path / "run", *options)
    assert (talk.returncode, talk.stdout.count("\n")) == (0, 1), "what does not fit is refused, and the talk goes on"
    assert "error: the last question must have at most" in talk.stderr
    refused = command("chat", base, "--message", "a")
    assert refused.returncode == 2
    assert "has no chat template" in refused.stderr


def test_the_table_shows_before_and_after():
    """A task that was not scored before has a dash."""
    after = {"stops": share([True, True])._asdict(), "new": share([False])._asdict()}
    text = format_scores({"before": {"stops": share([False, True])._asdict()}, "after": after})
    assert text.splitlines()[1].split() == ["stops", "2", "50.0%", "±", "35.4%", "100.0%", "±", "0.0%"]
    assert text.splitlines()[2].split() == ["new", "1", "-", "0.0%", "±", "0.0%"]
