"""How a question becomes a prompt: the seeds' conversation templates, and the form in which a manifest carries one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

IMAGE = "<image>"


@dataclass(frozen=True)
class PromptTemplate:
    """One conversation style. roles: what stands before the user's and the assistant's words. separators: what ends them.

    pre_query, post_query: set before and after a question. answer_prefix: what the assistant's answer begins with.
    """

    system: str
    roles: tuple[str, str]
    separators: tuple[str, str]
    image_tag: str = f"{IMAGE}\n"
    pre_query: str | None = None
    post_query: str | None = None
    answer_prefix: str | None = None

    def query(
        self, question: str, images: int = 1, pre_query: str | None = None, post_query: str | None = None
    ) -> str:
        """The user's message: image tags (unless the question has its own), then the question (upstream's user_query)."""
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
        """The whole prompt. turns: (user's message, answer or None) in order; an answer in the last turn is a prefix to go on from.

        final_separator closes the last answer too, as in training.
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
        """What a further question adds after an answer: the answer's end, the user's message without images, the assistant's role."""
        parts = (part for part in (self.pre_query, question, self.post_query) if part is not None)
        return (
            self.separators[1]
            + self.roles[0]
            + " ".join(parts)
            + self.separators[0]
            + self.roles[1]
            + (self.answer_prefix or "")
        )

    def as_json(self) -> dict[str, Any]:
        """The manifest's form."""
        return {**vars(self), "roles": list(self.roles), "separators": list(self.separators)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> PromptTemplate:
        """The inverse of as_json. Raises ValueError, KeyError or TypeError."""

        def text(x: object, optional: bool = False) -> Any:
            if (x is None and optional) or (isinstance(x, str) and len(x) <= 1 << 16):
                return x
            raise ValueError("the prompt template must be made of texts")

        roles, separators = ([text(x) for x in value[key]] for key in ("roles", "separators"))
        if len(roles) != 2 or len(separators) != 2:
            raise ValueError("the prompt template needs two roles and two separators")
        image_tag = text(value.get("image_tag", f"{IMAGE}\n"))
        if not image_tag.startswith(IMAGE):
            raise ValueError(f"the prompt template's image_tag must begin with {IMAGE}")
        return PromptTemplate(
            text(value.get("system", "")),
            (roles[0], roles[1]),
            (separators[0], separators[1]),
            image_tag,
            *(text(value.get(key), optional=True) for key in ("pre_query", "post_query", "answer_prefix")),
        )


_VICUNA = PromptTemplate("", ("USER: ", "ASSISTANT: "), (" ", "</s>"))
_QWEN = PromptTemplate(
    "", ("<|im_start|>user\n", "<|im_start|>assistant\n"), ("<|im_end|>\n", "<|im_end|>\n")
)
_VIDEO_CHATGPT = (
    "You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content that the user provides, and "
    "assist the user with a variety of tasks using natural language.Follow the instructions carefully and explain your answers in detail "
    "based on the provided video."
)
MVBENCH_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, and the action "
    "and pose of persons. Based on your observations, select the best option that accurately addresses the question.\n"
)
_VIDEOQA_QUERY = (
    "The input consists of a sequence of key frames from a video. Answer the question concisely first and followed by significant "
    "events, characters, or objects that appear throughout the frames. Question:"
)
_VIDEOQA_ANSWER = "Answer: In the video,"

# The names are upstream's; a checkpoint was trained with one of them, and the wording is part of the model.
TEMPLATES: dict[str, PromptTemplate] = {
    "plain_v1": _VICUNA,
    "plain_qwen": _QWEN,
    "conv_vcg_v1": replace(_VICUNA, system=_VIDEO_CHATGPT),
    "conv_vcg_qwen": replace(_QWEN, system=_VIDEO_CHATGPT),
    "conv_mvbench_v1": replace(_VICUNA, system=MVBENCH_SYSTEM),
    "conv_videoqa_v1": replace(_VICUNA, pre_query=_VIDEOQA_QUERY, answer_prefix=_VIDEOQA_ANSWER),
    "conv_videoqa_qwen": replace(_QWEN, pre_query=_VIDEOQA_QUERY, answer_prefix=_VIDEOQA_ANSWER),
}
