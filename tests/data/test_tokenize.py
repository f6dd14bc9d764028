import functools
import logging
import resource
import subprocess
import sys

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from funcattrib.data import Columns, Rows, TokenizeReport, tokenize
from funcattrib.errors import DataError

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Like templates that drop the reasoning of earlier turns: a turn is written differently once others follow.
FORGETFUL = PLAIN.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' %}{{ 'Hm.' if loop.last }}")
TEMPLATES = {"generation": TEMPLATE, "plain": PLAIN, "forgetful": FORGETFUL, None: None}


@functools.cache
def _trained(merges: bool, eos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 300 if merges else len(alphabet) + len(special)
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["hello world, hello there, the world is round\n" * 3], trainer)
    # Offsets without the blanks before a word, as GPT-2 and its kin have them.
    parts = [processors.ByteLevel(trim_offsets=True)]
    if eos:
        parts.append(processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)]))
    tokenizer.post_processor = processors.Sequence(parts)
    return tokenizer


def byte_tokenizer(template: str | None = None, *, merges: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_trained(merges, eos), eos_token="<eos>", model_max_length=16)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def data(**columns):
    return datasets.Dataset.from_dict(columns)


def run(dataset, tokenizer=None, columns=None, *, max_length=100, truncation=False, **more):
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    return tokenize(dataset, tokenizer, columns, max_length=max_length, truncation=truncation, **more)


def labelled_text(result, tokenizer=None):
    """The text of each run of labelled tokens, row by row."""
    tokenizer = tokenizer or byte_tokenizer()
    rows = []
    for row in result.dataset:
        runs, open_run = [], False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, -100)
            if label != -100:
                if not open_run:
                    runs.append([])
                runs[-1].append(token)
            open_run = label != -100
        rows.append([tokenizer.decode(part) for part in runs])
    return rows


def test_text_is_tokenised_as_the_tokenizer_does(caplog):
    texts = ["hello world", "", "a", "the world is round " * 4]
    result = run(data(text=texts, other=[1, 2, 3, 4]))
    assert result.dataset.column_names == ["input_ids", "labels", "length"]
    expected = [byte_tokenizer()(text, verbose=False)["input_ids"] for text in texts]
    assert result.dataset["input_ids"][:] == result.dataset["labels"][:] == expected
    lengths = [len(ids) for ids in expected]
    assert result.dataset["length"][:] == Rows(result.dataset).lengths.tolist() == lengths
    counted = sum(lengths) - 3  # the first token of a document is predicted by nothing
    assert result.report == TokenizeReport(4, sum(lengths), counted, empty=2, unlabelled=0, truncated=0)
    assert len(result.report.lines()) == 2
    assert not caplog.records


def test_special_tokens_of_the_tokenizer_stay_where_it_puts_them():
    tokenizer = byte_tokenizer(eos=True)
    result = run(data(p=["hello", "hello"], c=[" world", ""]), tokenizer, Columns("p", "c"))
    assert labelled_text(result, tokenizer) == [[" world<eos>"], []]
    assert result.dataset[0]["input_ids"] == tokenizer("hello world")["input_ids"]
    assert run(data(text=["hello"]), tokenizer).dataset[0]["labels"][-1] == 0


def test_with_a_completion_the_loss_is_on_it_alone():
    rows = data(p=["hello", "hello ", "", "hello there", "naïve 日本"], c=[" world", "world", "the world", "", "語 ok"])
    result = run(rows, columns=Columns("p", "c"))
    # In the second row the tokenizer puts the border inside a token: that token counts.
    assert labelled_text(result) == [[" world"], [" world"], ["the world"], [], ["語 ok"]]
    assert result.report.unlabelled == 1


CONVERSATIONS = [
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " world \n"},
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "round"},
    ],
    [{"role": "user", "content": "hello"}],
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("generation", [" world \n<|im_end|>\n", "round<|im_end|>\n"]),
        ("plain", [" world \n<|im_end|>\n", "round<|im_end|>\n"]),
        ("forgetful", ["world \n<|im_end|>\n", "Hm.round<|im_end|>\n"]),
        (None, [" world \n", "round"]),
    ],
)
def test_in_a_conversation_the_loss_is_on_the_assistants_turns(template, expected, caplog):
    tokenizer = byte_tokenizer(template)
    with caplog.at_level(logging.WARNING):
        result = run(data(m=CONVERSATIONS), tokenizer, Columns(conversation_column="m"))
    found = labelled_text(result, tokenizer)
    if template == "forgetful":
        found[0][0] = found[0][0].strip(" ")  # the blank before a content that was looked for may be in its first token
        expected = [expected[0].strip(" "), *expected[1:]]
    assert found == [expected, []]
    assert result.report.unlabelled + result.report.empty == 1
    assert [record.message[:34] for record in caplog.records] == (
        [] if template else ["the tokenizer has no chat template"]
    )
    whole = tokenizer.decode(result.dataset[0]["input_ids"])
    if template is None:
        assert whole == "".join(message["content"] for message in CONVERSATIONS[0])
    else:
        assert whole == tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)


def test_a_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer()
    result = run(data(p=["hé"], c=["llo"]), tokenizer, Columns("p", "c"))
    assert labelled_text(result, tokenizer) == [["llo</s>"]]
    result = run(data(m=CONVERSATIONS), tokenizer, Columns(conversation_column="m"))
    assert labelled_text(result, tokenizer)[0] == [" world \n", "round</s>"]
    cut = run(data(text=["hello", "hel"], c=["x", "y"]), tokenizer, max_length=4, truncation=True)
    assert cut.report.truncated == 1
    assert cut.dataset["length"][:] == [4, 4]


@pytest.mark.parametrize("eos", [False, True])
def test_truncation_is_the_tokenizers_and_is_counted(eos):
    tokenizer = byte_tokenizer(eos=eos)
    texts = ["a" * 9, "a" * 20, "a" * (10 - eos), "a"]
    result = run(data(text=texts), tokenizer, max_length=10, truncation=True)
    assert result.dataset["input_ids"][:] == [tokenizer(t, truncation=True, max_length=10)["input_ids"] for t in texts]
    assert result.report.truncated == 1


def test_ready_tokens_pass_and_lose_their_padding():
    ready = data(
        input_ids=[[5, 6, 0, 0], [0, 0, 8, 9]],
        attention_mask=[[1, 1, 0, 0], [0, 0, 1, 1]],
        labels=[[-100, 6, -100, -100], [-100] * 4],
        token_weights=[[1, 0.5, 0, 0], [0, 0, 1, 1]],
        text=["a", "b"],
    )
    result = run(ready)
    assert result.dataset[:] == {
        "input_ids": [[5, 6], [8, 9]],
        "labels": [[-100, 6], [-100, -100]],
        "token_weights": [[1, 0.5], [1, 1]],
        "length": [2, 2],
    }
    assert result.report == TokenizeReport(2, 4, 1, empty=0, unlabelled=1, truncated=0)
    assert tokenize(data(input_ids=[[1, 2, 3]]), None, max_length=2, truncation=True).dataset[0]["labels"] == [1, 2]
    # Asked for by name, the text is read.
    assert run(ready.rename_column("text", "body"), columns=Columns("body")).report.documents == 2
    shuffled = ready.select([1, 0])
    assert run(shuffled).dataset["input_ids"][:] == [[8, 9], [5, 6]]


CHAT = Columns(conversation_column="m")


@pytest.mark.parametrize(
    ("dataset", "columns", "says"),
    [
        (data(text=[]), None, "no rows to tokenise"),
        (data(body=["a"]), None, "no column 'text'; its columns are body"),
        (data(text=["a"]), Columns(completion_column="c"), r"column 'c'.*\n.*`columns=Columns\(prompt_column=…\)`"),
        (data(text=["a"]), Columns(token_weights_column="w"), r"`columns=Columns\(token_weights_column=…\)`"),
        (data(text=["a", None, None]), None, r"2 rows: 1, 2"),
        (data(text=[None, None]), None, "found null"),
        (data(text=[1.5, float("nan")]), None, r"found double|found float64"),
        (data(text=[["a"]]), None, "found List"),
        (data(m=CONVERSATIONS), Columns("m"), r"`columns=Columns\(conversation_column='m'\)`"),
        (
            data(text=["a", "hello " * 120]),
            None,
            r"at most 100 tokens, found \d+ in row 1\n.*`truncation`.*split or drop",
        ),
        (data(m=["a"]), CHAT, "list of messages"),
        (data(m=[None, CONVERSATIONS[0]]), CHAT, "1 row: 0"),
        (data(m=[[{"role": "user", "content": None}]]), CHAT, "'content'"),
        (data(m=[[{"from": "user", "value": "a"}]]), CHAT, "'role'"),
        (data(m=[[{"role": "user", "content": ["a"]}]]), CHAT, "row 0"),
        (data(input_ids=[[1, 2]], labels=[[1]]), None, "row 0"),
        (data(input_ids=[[1], [5, 9999]]), None, "below .* found 9999 in row 1"),
        (data(input_ids=[[5, -1]]), None, "found -1"),
        (data(input_ids=[[5, 6]], labels=[[5, 9999]]), None, "'labels'"),
        (data(input_ids=[[5.5]]), None, "whole numbers"),
        (data(input_ids=["a"]), None, "whole numbers"),
        (data(input_ids=[5]), None, "whole numbers"),
        (data(input_ids=[None, [5]]), None, "1 row: 0"),
        (data(input_ids=[[5, None]]), None, "row 0"),
        (data(input_ids=[[5]], labels=[1]), None, "'labels'"),
        (data(input_ids=[[5] * 101]), None, "at most 100 tokens, found 101 in row 0"),
        (data(input_ids=[[1, 2, 3]], attention_mask=[[1, 0, 1]]), None, "hides a token inside row 0"),
        (data(input_ids=[[1]], token_weights=[[float("nan")]]), None, "'token_weights'"),
    ],
)
def test_bad_input_is_said_in_two_lines(dataset, columns, says):
    with pytest.raises(DataError, match=says) as raised:
        run(dataset, columns=columns)

    assert str(raised.value).count("\n") == 1


def test_a_template_that_refuses_a_conversation_names_the_row():
    tokenizer = byte_tokenizer("plain")
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}hello"
    with pytest.raises(DataError, match="the chat template refused the conversation in row 1: user first"):
        run(data(m=[CONVERSATIONS[1], CONVERSATIONS[0]]), tokenizer, CHAT)
    tokenizer.chat_template = "{{ not jinja %}"
    with pytest.raises(DataError, match="row 0"):
        run(data(m=CONVERSATIONS), tokenizer, CHAT)


def test_tokens_that_the_model_does_not_know():
    with pytest.raises(DataError, match="below 50, the model's vocabulary"):
        run(data(text=["hello"]), vocab_size=50)
    with pytest.raises(DataError, match="no column 'input_ids' and no tokenizer was given"):
        tokenize(data(text=["a"]), None, max_length=9, truncation=False)


def test_many_batches_keep_their_order_and_report_progress():
    texts = [f"hello {number}" for number in range(2500)]
    done = []
    result = run(data(text=texts).select(range(2499, -1, -1)), advance=done.append)
    assert done == [1000, 1000, 500]
    rows = Rows(result.dataset)
    assert [byte_tokenizer().decode(rows[i]["input_ids"]) for i in (0, 1700, 2499)] == [
        texts[2499],
        texts[799],
        texts[0],
    ]


def test_nothing_is_left_in_the_scratch_folder(tmp_path):
    result = run(data(text=["hello"]), scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert result.dataset[0]["length"] == 1
    with pytest.raises(DataError, match="TMPDIR"):
        run(data(text=["hello"]), scratch=tmp_path / "missing")


FULL_DISK = """
import resource, signal, datasets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from funcattrib.data import tokenize
rows = datasets.Dataset.from_dict({"input_ids": [[1] * 100] * 2000})
tokenize(rows, None, max_length=100, truncation=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file-size limits")
def test_a_full_disk_is_said():
    ended = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, check=False)
    assert "DataError: the tokenised data cannot be written to" in ended.stderr
    assert "TMPDIR" in ended.stderr


def test_rows_are_views_and_not_copies():
    rows = Rows(run(data(text=["hello world", "there"])).dataset)
    assert not rows[0]["input_ids"].flags.owndata
    assert np.shares_memory(rows[0]["input_ids"], rows[0]["labels"])  # every token labelled: kept once


CALL = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"at": "now"}}}]},
]
TOOLS = (
    "{% if tools %}{{ tools|tojson + '\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function|tojson }}{% endif %}{{ (m.content or '') + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{% if shout %}{{ '!' }}{% endif %}"
)


def tool_tokenizer():
    tokenizer = byte_tokenizer("plain")
    tokenizer.chat_template = TOOLS
    return tokenizer


def test_a_message_is_written_with_its_own_keys_alone():
    other = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"arguments": {"by": 5}}}]}]
    both = run(data(m=[CALL, other]), tool_tokenizer(), CHAT)
    alone = run(data(m=[CALL]), tool_tokenizer(), CHAT)
    assert both.dataset["input_ids"][0] == alone.dataset["input_ids"][0]


def test_the_template_is_given_tools_and_values_of_its_own():
    tools = [{"type": "function", "function": {"name": "f"}}]
    plain = run(data(m=[CALL]), tool_tokenizer(), CHAT, max_length=200).dataset["input_ids"][0]
    ways = [{"tools": [tools]}, {"tools": ['[{"type": "function", "function": {"name": "f"}}]']}]
    told = [run(data(m=[CALL], **way), tool_tokenizer(), CHAT, max_length=200) for way in ways]
    expected = tool_tokenizer().apply_chat_template(CALL, tools=tools, tokenize=False)
    assert [tool_tokenizer().decode(each.dataset["input_ids"][0]) for each in told] == [expected] * 2
    assert labelled_text(told[0]) == labelled_text(run(data(m=[CALL]), tool_tokenizer(), CHAT))
    shouted = run(data(m=[CALL], chat_template_kwargs=[{"shout": True}]), tool_tokenizer(), CHAT)
    assert byte_tokenizer().decode(shouted.dataset["input_ids"][0]).endswith("!")
    assert run(data(m=[CALL], tools=[None]), tool_tokenizer(), CHAT).dataset["input_ids"][0] == plain
    # a template that writes no tools is given none, whatever the column holds
    assert run(data(m=CONVERSATIONS, tools=["a", "b"]), byte_tokenizer("plain"), CHAT).report.documents == 2


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_message_of_weight_0_does_not_count(template):
    tokenizer, messages = byte_tokenizer(template), CONVERSATIONS[0]
    whole = labelled_text(run(data(m=[messages]), tokenizer, CHAT))[0]
    for turn, left in ((2, whole[1:]), (4, whole[:1])):
        weighed = [message | ({"weight": 0} if at == turn else {}) for at, message in enumerate(messages)]
        assert labelled_text(run(data(m=[weighed]), tokenizer, CHAT)) == [left]
    kept = [message | {"weight": 1.0} for message in messages]
    assert labelled_text(run(data(m=[kept]), tokenizer, CHAT)) == [whole]
    with pytest.raises(DataError, match=r"'weight' of 0 or 1, found 0\.5 in row 0"):
        run(data(m=[[message | {"weight": 0.5} for message in messages]]), tokenizer, CHAT)


@pytest.mark.parametrize("template", ["generation", "plain", None])
def test_a_prompt_and_a_completion_of_messages(template):
    tokenizer, messages = byte_tokenizer(template), CONVERSATIONS[0]
    for turns, expected in ((2, " world \n<|im_end|>\n<|im_start|>user\nthere"), (4, "round")):
        result = run(data(p=[messages[:turns]], c=[messages[turns:]]), tokenizer, Columns("p", "c"))
        whole = tokenizer.decode(result.dataset["input_ids"][0])
        assert whole == tokenizer.decode(run(data(m=[messages]), tokenizer, CHAT).dataset["input_ids"][0])
        (counted,) = labelled_text(result)[0]
        assert whole.endswith(counted)
        assert counted.startswith(expected if template else expected.replace("<|im_end|>\n<|im_start|>user\n", ""))


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks", "loss_mask"])
@pytest.mark.parametrize("kind", [int, bool])
def test_the_masks_of_ready_tokens_say_which_count(mask, kind):
    ids, masks = [[5, 6, 7], [8, 9, 10]], [[kind(k) for k in row] for row in ([0, 1, 1], [0, 0, 1])]
    result = run(data(input_ids=ids, attention_mask=[[1, 1, 0], [1, 1, 1]], **{mask: masks}))
    assert result.dataset["labels"][:] == [[-100, 6], [-100, -100, 10]]
    labelled = run(data(input_ids=ids, labels=ids, **{mask: masks}))  # labels have taken the masks in
    assert labelled.dataset["labels"][:] == ids
    with pytest.raises(DataError, match=f"2 in '{mask}'"):
        run(data(input_ids=ids, **{mask: [[0, 1], [0, 0, 1]]}))


def test_a_column_asked_for_is_read_in_place_of_ready_tokens():
    both = data(text=["hello world"], input_ids=[[5, 6]])
    assert run(both).dataset["input_ids"][0] == [5, 6]
    asked = run(both, columns=Columns("text")).dataset["input_ids"][0]
    assert asked == byte_tokenizer()("hello world")["input_ids"]


def test_all_documents_that_are_too_long_are_counted():
    for columns, word in (({"text": ["hello " * 120, "a", *["hello " * 130] * 2500]}, "row 0"), ({}, "row 1")):
        rows = data(**columns) if columns else data(input_ids=[[5], *[[5] * 101] * 2501])
        with pytest.raises(DataError, match=rf"in {word} of d\.jsonl, and 2,500 more that are longer\n"):
            run(rows, name="d.jsonl")
