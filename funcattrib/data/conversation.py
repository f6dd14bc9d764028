"""Conversations to text, with the assistant's turns as character spans."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from funcattrib.data.encode import Text
from funcattrib.errors import DataError
from funcattrib.runtime.hub import reason

Message = dict[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

OPTIONS = ("tools", "chat_template_kwargs")
"""Columns beside the messages that a chat template is given: the tools that may be called, and its values."""


class Conversation(NamedTuple):
    """The messages of a row, and which of them count.

    Attributes:
        messages: ``{"role": …, "content": …}`` each.
        prompt: the number of messages before those that count; None where the assistant's count.
        options: what the template is given beside the messages.
    """

    messages: list[Message]
    prompt: int | None
    options: dict[str, Any]


def renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Conversation], Text]:
    """Return the function by which this tokenizer writes a conversation down, and marks the characters that count.

    * after a prompt: what follows the text that asks for an answer to it;
    * a chat template that marks the assistant's with `{% generation %}`: what it marks;
    * any other chat template: what the assistant's turn adds to the text that asks for it;
    * no chat template: the turns' contents, one after the other, of which the assistant's count.

    An assistant's message of weight 0 does not count.
    """
    if not has_template(tokenizer):
        return _concatenation

    def write(conversation: Conversation) -> Text:
        if conversation.prompt is not None:
            return _after_the_prompt(conversation, tokenizer)
        template = tokenizer.get_chat_template(tools=conversation.options.get("tools"))
        if _GENERATION.search(template):
            return _marked(conversation, template, tokenizer)
        return _by_prefixes(conversation, tokenizer)

    return write


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def options_read(tokenizer: PreTrainedTokenizerBase, names: Collection[str]) -> list[str]:
    """Return those of a data set's columns that the tokenizer's chat template is given beside the messages."""
    templates = str(getattr(tokenizer, "chat_template", None) or "")
    return [name for name in OPTIONS if name in names and (name != "tools" or re.search(r"\btools\b", templates))]


def render(
    parts: Mapping[str, Any], write: Callable[[Conversation], Text], *, row: int, options: Mapping[str, Any]
) -> Text:
    """Render one row's conversation as text.

    Args:
        parts: column → messages, `{"role": …, "content": …}` each; of two columns, the first is the prompt, and the
            loss counts the second.
        write: from `renderer`.
        row: its number, for messages.
        options: the row's columns of ``OPTIONS``.

    Raises:
        DataError: where it is no list of messages, or the template refuses it.
    """
    lists = [_checked(messages, row, column) for column, messages in parts.items()]
    messages = [message for each in lists for message in each]
    prompt = len(lists[0]) if len(lists) > 1 else None
    try:
        return write(Conversation(messages, prompt, _options(options)))
    except DataError:
        raise
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"the chat template refused the conversation in row {row}: {reason(error)}\n"
            f"its roles are {[message['role'] for message in messages][:8]}; change the row or the template"
        ) from error


def _options(columns: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in columns.items() if name != "chat_template_kwargs"}
    options |= columns.get("chat_template_kwargs") or {}
    tools = options.get("tools")
    if isinstance(tools, str):
        options["tools"] = json.loads(tools)
    return {name: _without_nulls(value) for name, value in options.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    """Return the same without the keys that are null: Arrow gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _checked(conversation: Any, row: int, column: str) -> list[Message]:
    cure = 'give every row a list like [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(conversation, list):
        raise DataError(
            f"expected a list of messages in column '{column}', found {conversation!r:.80} in row {row}\n{cure}"
        )
    messages = []
    for message in conversation:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"expected messages with 'role' and 'content', found {message!r:.80} in row {row}\n{cure}")
        message = _without_nulls(message)
        if "content" not in message and not message.get("tool_calls"):
            raise DataError(f"a message in row {row} has no 'content': {message!r:.80}\n{cure}")
        if message.get("weight", 1) not in (0, 1):
            raise DataError(
                f"expected a message's 'weight' of 0 or 1, found {message['weight']!r} in row {row}\n"
                "weigh tokens by a column, with `columns=Columns(token_weights_column=…)`"
            )
        messages.append(message)
    return messages


def _counts(message: Message) -> bool:
    """Return whether a message is the assistant's, and counts."""
    return bool(message["role"] == "assistant" and message.get("weight", 1))


def _concatenation(conversation: Conversation) -> Text:
    text, spans = "", []
    for turn, message in enumerate(conversation.messages):
        content = message.get("content", "")
        if not isinstance(content, str):
            raise TypeError(f"content that is no text: {content!r:.80}")
        counts = _counts(message) if conversation.prompt is None else turn >= conversation.prompt
        if counts and content:
            spans.append((len(text), len(text) + len(content)))
        text += content
    return Text(text, spans)


def _after_the_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Text:
    prompt, options = conversation.messages[: conversation.prompt], conversation.options
    asks = not prompt or prompt[-1]["role"] != "assistant"  # a prompt may end within the assistant's turn
    ending: dict[str, Any] = {"add_generation_prompt": True} if asks else {"continue_final_message": True}
    text = str(tokenizer.apply_chat_template(conversation.messages, tokenize=False, **options))
    before = str(tokenizer.apply_chat_template(prompt, tokenize=False, **ending, **options)) if prompt else ""
    return Text(text, [(_shared(before, text), len(text))])


def _marked(conversation: Conversation, template: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    # apply_chat_template's own mask is not used: where a marked range starts or ends with a character that the
    # tokenizer trims from its offsets, it drops the range, or lets it run to the end of the conversation.
    write: Any = render_jinja_template  # its annotations do not say what it returns
    texts, marked = write(
        conversations=[conversation.messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **conversation.options},
    )
    spans = [(start, stop) for start, stop in marked[0]]
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    if not all(map(_counts, answers)):
        if len(spans) != len(answers):
            raise ValueError(f"{len(answers)} turns of the assistant, {len(spans)} of them marked, and one of weight 0")
        spans = [span for span, message in zip(spans, answers, strict=True) if _counts(message)]
    return Text(texts[0], spans)


def _by_prefixes(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Text:
    messages, options = conversation.messages, conversation.options

    def write(upto: int, asking: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                messages[:upto], tokenize=False, add_generation_prompt=asking, **options
            )
        except Exception:  # a template need not take part of a conversation, or an empty one
            return ""
        return str(text)

    text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    spans: list[tuple[int, int]] = []
    counted: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = write(turn, asking=True), write(turn + 1, asking=False)
            spans.append(_turn(text, before, after, str(message.get("content", "")), spans[-1][1] if spans else 0))
            counted += spans[-1:] if _counts(message) else []
    return Text(text, [span for span in counted if span[0] < span[1]])


def _turn(text: str, before: str, after: str, content: str, earliest: int) -> tuple[int, int]:
    """Find a turn in the whole text, given the text up to its request and the text up to its end."""
    if after and text.startswith(after):
        return max(earliest, _shared(before, text)), len(after)
    # Some templates write a turn differently once others follow (they drop its reasoning). Look for the content itself,
    # and for what ends the turn after it.
    start = text.find(content.strip(), max(earliest, _shared(before, text)))
    if not content.strip() or start < 0:
        raise ValueError("an assistant's turn that cannot be found in the rendered text; mark it with {% generation %}")
    stop = start + len(content.strip())
    closing = after[after.rfind(content.strip()) + len(content.strip()) :] if content.strip() in after else ""
    return start, stop + _shared(closing, text[stop:])


def _shared(left: str, right: str) -> int:
    """Count the characters on which two texts agree from the start."""
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
