"""Conversation -> tokens and labels: what the model reads, and which tokens are the target that training would teach.

Target spans come from prefix rendering: the conversation is rendered up to each turn and the texts are compared, so stock
chat templates without `{% generation %}` marks work. Where a template renders an earlier turn differently once later
turns follow (Qwen3 drops old thinking, Mistral moves the system prompt), the turn is found by rendering a marker in its place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from .errors import InputError, UnscorableRow, first_line
from .formats import Conversation, Layout, Message, to_conversation

logger = logging.getLogger(__name__)

Target = Literal["assistant", "last_assistant", "completion", "all"]
TARGETS: tuple[str, ...] = get_args(Target)
IGNORE = -100
FALLBACK_TEMPLATE = "hf_safefilter-fallback"
# Rendered in a turn's place to find it: private-use characters, which no template treats specially.
_MARKER = "\ue000turn\ue001"

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One encoded row. `labels` is `input_ids` at target tokens that are predicted, and -100 elsewhere; both [tokens]."""

    input_ids: list[int]
    labels: list[int]
    status: str = "ok"

    @property
    def target_positions(self) -> list[int]:
        """Indices of the target tokens, in order."""
        return [i for i, label in enumerate(self.labels) if label != IGNORE]

    def first_targets(self, count: int) -> Example:
        """The example with only its first `count` target tokens as labels, cut after the last of them.

        A causal model's loss at these tokens does not depend on what follows, so cutting changes nothing but the cost.
        """
        positions = self.target_positions[:count]
        return self.first_tokens(positions[-1] + 1)

    def first_tokens(self, count: int) -> Example:
        """The example cut after its first `count` tokens."""
        return replace(self, input_ids=self.input_ids[:count], labels=self.labels[:count])


def check_options(max_length: Any, target: Any) -> None:
    """Raise `InputError` for a `max_length` under 2 or an unknown `target`."""
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
        raise InputError(f"max_length must be a whole number of at least 2 tokens, got {max_length!r}")


# A row beyond these is not read: tokenizing takes far more memory than the text.
MAX_CHARACTERS, MAX_MESSAGES = 1_000_000, 1000


class ChatEncoder:
    """Turns conversations into `Example`s with a tokenizer's chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer. One without a chat template gets the fallback template
            (`assets/templates/fallback.jinja`), with a warning.
        max_length: tokens kept from the start of a row.
        target: which tokens count. `assistant`: every assistant turn; `last_assistant`: the last one; `completion`: all
            that follows the prompt, or the last assistant turn where the row does not say what its prompt is; `all`: every
            token. An assistant turn ends with its end-of-turn token; white space that the template adds after it is left out.
            Rows of plain text are trained on whole, so there every token counts whatever `target` is.
        template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        InputError: a tokenizer without character offsets, an unknown target, a `max_length` under 2.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 1024,
        target: Target = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_options(max_length, target)
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer (one with a tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.target = target
        self.template_kwargs = dict(template_kwargs or {})
        self.template: str | None = None
        if not tokenizer.chat_template:
            self.template = resources.files(__package__).joinpath("assets/templates/fallback.jinja").read_text("utf-8")
            logger.warning("the tokenizer has no chat template: rendering with %s", FALLBACK_TEMPLATE)

    @property
    def template_name(self) -> str:
        """`tokenizer` or the fallback template's name."""
        return "tokenizer" if self.template is None else FALLBACK_TEMPLATE

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token's text; of tokens that share a character, the first has it and the others are empty."""
        texts: list[str] = []
        before: list[int] = []  # some tokenizers drop the space before a token that they decode first
        pending: list[int] = []
        for place, token in enumerate(ids):
            pending.append(token)
            text = self.tokenizer.decode(before + pending)[len(self.tokenizer.decode(before)) :]
            # Half a character decodes as U+FFFD; no character has more than four bytes, so no wait is longer.
            if text.endswith("\ufffd") and len(pending) < 4 and place + 1 < len(ids):
                continue
            texts += [text, *[""] * (len(pending) - 1)]
            before, pending = pending, []
        return texts

    def encode_row(self, row: Mapping[str, Any], layout: Layout) -> Example:
        """Encode one row of a dataset.

        Raises:
            UnscorableRow: the row is malformed, its template rejects it, or no target token is left.
        """
        return self.encode(to_conversation(row, layout))

    def encode(self, conversation: Conversation, target: Target | None = None, max_length: int | None = None) -> Example:
        """Encode one conversation, truncated to `max_length` tokens from its start; both options as given, or the encoder's.

        `status` is `"ok"`, or says that target tokens were lost to truncation or that content holds control tokens
        (which are encoded as such, because a trainer would do the same).

        Raises:
            UnscorableRow: the template rejects the conversation, or no target token is left to predict.
        """
        if len(conversation.messages) > MAX_MESSAGES:
            # Each turn is located by rendering what stands before it.
            raise UnscorableRow(f"too many messages: {len(conversation.messages):,}, and at most {MAX_MESSAGES:,} are read")
        size = len(conversation.text or "") + sum(len(_content(m)) for m in conversation.messages)
        if size > MAX_CHARACTERS:
            raise UnscorableRow(f"too long: {size:,} characters, and at most {MAX_CHARACTERS:,} are read")
        if conversation.text is not None:
            text = conversation.text + (self.tokenizer.eos_token or "")
            # Raw text gets the special tokens that the tokenizer adds by itself, as in trainers.
            encoding = self.tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
            spans = [(0, len(text))]
        else:
            text = self.render(conversation.messages, tools=conversation.tools)
            spans = self._target_spans(conversation, text, target or self.target)
            # The template writes the special tokens itself.
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        labels = _labels(ids, encoding["offset_mapping"], spans)
        wanted = sum(label != IGNORE for label in labels)
        if not wanted:
            raise UnscorableRow("no target token: the row has nothing for the model to predict")
        length = max_length or self.max_length
        ids, labels = ids[:length], labels[:length]
        kept = sum(label != IGNORE for label in labels)
        if not kept:
            raise UnscorableRow(f"no target token left: truncation at max_length={length} cut all {wanted}")
        notes = []
        if kept < wanted:
            notes.append(f"truncated: kept {kept} of {wanted} target tokens (max_length={length})")
        if found := self._control_tokens(conversation):
            notes.append(f"content holds control tokens: {' '.join(found)}")
        return Example(ids, labels, "; ".join(notes) or "ok")

    def target_text(self, example: Example) -> str:
        """The target tokens as text, without special tokens."""
        return str(self.tokenizer.decode([example.input_ids[i] for i in example.target_positions], skip_special_tokens=True))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as the text that the model reads.

        Raises:
            UnscorableRow: the template rejects the messages (roles in an order it does not allow, say).
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self.template,
                    tools=tools,
                    **self.template_kwargs,
                )
            )
        # Templates are programs: besides jinja2's own errors they raise those of the operations in them.
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise UnscorableRow(f"the chat template rejects the row: {first_line(error)}") from None

    def _target_spans(self, conversation: Conversation, text: str, target: str) -> list[Span]:
        """Character spans [start, end) of the target in the rendered text."""
        messages, tools = conversation.messages, conversation.tools
        if target == "all":
            return [(0, len(text))]
        if target == "completion" and (first := conversation.prompt_messages) is not None:
            if not any(_content(m) for m in messages[first:]):
                raise UnscorableRow("no target: the completion is empty")
            return [(self._turn_start(messages, first, text, tools), len(text))]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise UnscorableRow("no target: the row has no assistant turn")
        if target != "assistant":
            turns = turns[-1:]
        if not any(_content(messages[i]) for i in turns):
            raise UnscorableRow("no target: the response is empty")
        return [self._turn_span(messages, i, text, tools) for i in turns]

    def _turn_start(self, messages: Sequence[Message], turn: int, text: str, tools: list[Any] | None) -> int:
        """Where the turn's own text begins: after what the template writes to open it."""
        opening = messages[turn]["role"] == "assistant"
        start = self._prefix(messages[:turn], text, tools, add_generation_prompt=opening)
        return self._marked(messages, turn, text, tools)[0] if start is None else start

    def _turn_span(self, messages: Sequence[Message], turn: int, text: str, tools: list[Any] | None) -> Span:
        start = self._turn_start(messages, turn, text, tools)
        end = self._prefix(messages[: turn + 1], text, tools)
        if end is None:
            end = self._marked(messages, turn, text, tools)[1]
        # White space after the end-of-turn token separates turns; the response has ended.
        ended = text[start:end].rstrip()
        if ended.endswith(self._special_tokens):
            end = start + len(ended)
        return start, end

    def _prefix(
        self, messages: Sequence[Message], text: str, tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> int | None:
        """How far into the text these first messages reach; `None` where alone they render differently, or not at all."""
        try:
            prefix = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        except UnscorableRow:
            return None
        return len(prefix) if text.startswith(prefix) else None

    def _marked(self, messages: Sequence[Message], turn: int, text: str, tools: list[Any] | None) -> Span:
        """The turn's span, found by rendering the conversation with a marker in the turn's place."""
        marked = [{**m, "content": _MARKER} if i == turn else m for i, m in enumerate(messages)]
        before, found, after = self.render(marked, tools=tools).partition(_MARKER)
        end = len(text) - len(after)
        if not found or _MARKER in after or not (text.startswith(before) and text.endswith(after) and len(before) <= end):
            raise UnscorableRow(f"no target: the chat template rewrites message {turn}, so its tokens cannot be located")
        # What closes the turn belongs to it: what the template writes after the marker when nothing follows.
        closing = self.render(marked[: turn + 1], tools=tools).partition(_MARKER)[2]
        return len(before), end + (len(closing) if after.startswith(closing) else 0)

    def _control_tokens(self, conversation: Conversation) -> list[str]:
        """The tokenizer's control tokens that the row's own text spells out, sorted."""
        if self._control_pattern is None:
            return []
        contents = [conversation.text or "", *(_content(m) for m in conversation.messages)]
        return sorted({token for content in contents for token in self._control_pattern.findall(content)})

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return tuple({*self.tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)})

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        tokens = sorted(filter(None, self._special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _labels(ids: list[int], offsets: Sequence[Span], spans: list[Span]) -> list[int]:
    """Labels [tokens]: the token where its characters overlap a span (spans in order), else -100.

    The first token is never a target: nothing stands before it to predict it from.
    """
    labels = [IGNORE] * len(ids)
    span = 0
    for i in range(1, len(ids)):
        first, last = offsets[i]
        while span < len(spans) and spans[span][1] <= first:
            span += 1
        if span == len(spans):
            break
        if spans[span][0] < last and first < last:
            labels[i] = ids[i]
    return labels


def _content(message: Message) -> str:
    """The message's text; a tool call counts as text, because it is trained on."""
    return str(message.get("content") or message.get("tool_calls") or "")
