"""Prompt templates: upstream's conversation styles, and their form in a manifest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

IMAGE = "<image>"
Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]


@dataclass(frozen=True)
class PromptTemplate:
    """One conversation style.

    Attributes:
        system: The system prompt, or "".
        roles: Text before the user's and before the assistant's message.
        separators: Text after the user's and after the assistant's message.
        image_tag: The placeholder of one image or video, ending with a character that separates it from the
            question.
        pre_query: Text before the question, if any.
        post_query: Text after the question, if any.
        answer_prefix: The beginning of every answer, if any.
    """

    system: Text
    roles: tuple[Text, Text]
    separators: tuple[Text, Text]
    image_tag: Annotated[str, msgspec.Meta(max_length=256, pattern=f"^{IMAGE}")] = f"{IMAGE}\n"
    pre_query: Text | None = None
    post_query: Text | None = None
    answer_prefix: Text | None = None

    def query(
        self, question: str, images: int = 1, pre_query: str | None = None, post_query: str | None = None
    ) -> str:
        """The user's message: image tags, then the question (upstream's user_query).

        Args:
            question: The question; if it contains image tags, they are kept and none are added.
            images: How many image tags to add.
            pre_query: Text to put before the question.
            post_query: Text to put after the question.
        """
        if post_query is not None:
            question = f"{question} {post_query}"
        if pre_query is not None:
            question = f"{pre_query} {question}"
        if self.image_tag in question:
            return question
        bare, tail = self.image_tag[:-1], self.image_tag[-1]
        if bare in question:
            return question.replace(bare, self.image_tag)
        return bare * images + tail + question

    def render(self, turns: list[tuple[str, str | None]], final_separator: bool = False) -> str:
        """The complete prompt of a conversation.

        Args:
            turns: (user's message, answer or None), in order. The answer of the last turn is a prefix that
                the model continues.
            final_separator: Close the last answer too, as in training.
        """
        text = self.system + self.separators[0] if self.system else ""
        for i, (message, answer) in enumerate(turns):
            text += self.roles[0] + message + self.separators[0] + self.roles[1]
            if answer is not None:
                text += answer + (self.separators[1] if i + 1 < len(turns) or final_separator else "")
        return text

    def question_prompt(self, question: str, images: int = 1) -> str:
        """The prompt for one question, with this template's own additions."""
        return self.render(
            [(self.query(question, images, self.pre_query, self.post_query), self.answer_prefix)]
        )

    def follow_up(self, question: str) -> str:
        """The text that a follow-up question adds: separator, message, assistant's role."""
        message = " ".join(part for part in (self.pre_query, question, self.post_query) if part is not None)
        before, after = self.separators[1] + self.roles[0], self.separators[0] + self.roles[1]
        return before + message + after + (self.answer_prefix or "")

    def as_json(self) -> dict[str, Any]:
        """The form in manifest.json."""
        return {**vars(self), "roles": list(self.roles), "separators": list(self.separators)}

    @staticmethod
    def from_json(value: Any) -> PromptTemplate:
        """The inverse of as_json; a missing system prompt is empty.

        Raises:
            ValueError: The value isn't a template.
        """
        try:
            return msgspec.convert(
                {"system": "", **value} if isinstance(value, dict) else value, PromptTemplate
            )
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None


_VICUNA = PromptTemplate("", ("USER: ", "ASSISTANT: "), (" ", "</s>"))
_QWEN = PromptTemplate(
    "", ("<|im_start|>user\n", "<|im_start|>assistant\n"), ("<|im_end|>\n", "<|im_end|>\n")
)
_VIDEO_CHATGPT = (
    "You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content "
    "that the user provides, and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail based on the provided video."
)
MVBENCH_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the best "
    "option that accurately addresses the question.\n"
)
_VIDEOQA_QUERY = (
    "The input consists of a sequence of key frames from a video. Answer the question concisely first and "
    "followed by significant events, characters, or objects that appear throughout the frames. Question:"
)
_VIDEOQA_ANSWER = "Answer: In the video,"

# Upstream's names. A checkpoint was trained with one of these templates, so the wording is part of the model.
TEMPLATES: dict[str, PromptTemplate] = {
    "plain_v1": _VICUNA,
    "plain_qwen": _QWEN,
    "conv_vcg_v1": replace(_VICUNA, system=_VIDEO_CHATGPT),
    "conv_vcg_qwen": replace(_QWEN, system=_VIDEO_CHATGPT),
    "conv_mvbench_v1": replace(_VICUNA, system=MVBENCH_SYSTEM),
    "conv_videoqa_v1": replace(_VICUNA, pre_query=_VIDEOQA_QUERY, answer_prefix=_VIDEOQA_ANSWER),
    "conv_videoqa_qwen": replace(_QWEN, pre_query=_VIDEOQA_QUERY, answer_prefix=_VIDEOQA_ANSWER),
}
