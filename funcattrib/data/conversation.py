"""Conversations to text, with the assistant's turns as character spans."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from funcattrib.data.encode import Text
from funcattrib.errors import DataError
from funcattrib.runtime.hub import reason

Message = dict[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Message]], Text]:
    """Return the function by which this tokenizer writes a conversation down, and marks the assistant's characters.

    * a chat template that marks them with `{% generation %}`: what it marks;
    * any other chat template: what the assistant's turn adds to the text that asks for it;
    * no chat template: the turns' contents, one after the other, of which the assistant's count.
    """
    if not has_template(tokenizer):
        return _concatenation
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        return lambda messages: _marked(messages, template, tokenizer)
    return lambda messages: _by_prefixes(messages, tokenizer)


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(conversation: Any, write: Callable[[Sequence[Message]], Text], *, row: int, column: str) -> Text:
    """Render one row's conversation as text.

    Args:
        conversation: the messages, `{"role": …, "content": …}` each.
        write: from `renderer`.
        row: its number, for messages.
        column: its column, for messages.

    Raises:
        DataError: where it is no list of messages, or the template refuses it.
    """
    messages = _checked(conversation, row, column)
    try:
        return write(messages)
    except DataError:
        raise
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"the chat template refused the conversation in row {row}: {reason(error)}\n"
            f"its roles are {[message['role'] for message in messages][:8]}; change the row or the template"
        ) from error


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
        # Arrow gives every message every key; to a template, one that is null is one that is not there.
        message = {key: value for key, value in message.items() if value is not None}
        if "content" not in message and not message.get("tool_calls"):
            raise DataError(f"a message in row {row} has no 'content': {message!r:.80}\n{cure}")
        messages.append(message)
    return messages


def _concatenation(messages: Sequence[Message]) -> Text:
    text, spans = "", []
    for message in messages:
        content = message.get("content", "")
        if not isinstance(content, str):
            raise TypeError(f"content that is no text: {content!r:.80}")
        if message["role"] == "assistant" and content:
            spans.append((len(text), len(text) + len(content)))
        text += content
    return Text(text, spans)


def _marked(messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    # apply_chat_template's own mask is not used: where a marked range starts or ends with a character that the
    # tokenizer trims from its offsets, it drops the range, or lets it run to the end of the conversation.
    write: Any = render_jinja_template  # its annotations do not say what it returns
    texts, spans = write(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return Text(texts[0], [(start, stop) for start, stop in spans[0]])


def _by_prefixes(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Text:
    def write(upto: int, asking: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(list(messages[:upto]), tokenize=False, add_generation_prompt=asking)
        except Exception:  # a template need not take part of a conversation, or an empty one
            return ""
        return str(text)

    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = write(turn, asking=True), write(turn + 1, asking=False)
            spans.append(_turn(text, before, after, str(message.get("content", "")), spans[-1][1] if spans else 0))
    return Text(text, [span for span in spans if span[0] < span[1]])


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
