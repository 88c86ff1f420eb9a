"""Prompts of every template, as upstream renders them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.commands import GOLDEN
from ppllava_edge.engines.bundle.prompt_template import MVBENCH_SYSTEM, TEMPLATES, PromptTemplate

PROMPTS = json.loads((GOLDEN / "text" / "prompts.json").read_text())
VIDEOMME_TASK = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


def render(template: PromptTemplate, case: dict[str, Any]) -> str:
    """Render a case with the flow of upstream that it comes from."""
    kind = case["kind"]
    if kind == "qabench_flow":
        return template.question_prompt(case["q1"])
    if kind == "mvbench_flow":
        system = MVBENCH_SYSTEM if case["system_llm"] else ""
        query = f"{system}{case['question']}\nOnly give the best option."
        return template.render([(template.query(query), "Best option:(")])
    if kind == "videomme_flow":
        subtitles = case["subtitles"] and f"This video's subtitles are listed below: {case['subtitles']} \n"
        query = f"{subtitles or ''}{VIDEOMME_TASK}{case['question']}"
        return template.render([(template.query(query), "The best answer is:")])
    images = 3 if kind == "three_image_tokens" else 1
    turns: list[tuple[str, str | None]] = [(template.query(case["q1"], images=images), case.get("a1"))]
    if "q2" in case:
        turns.append((case["q2"], case.get("a2")))
    return template.render(turns, final_separator=kind == "two_turn_training_full")


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: f"{c['template']}-{c['kind']}")
def test_prompts(case: dict[str, Any]) -> None:
    assert render(TEMPLATES[case["template"]], case) == case["prompt"]


def test_templates_survive_the_manifest() -> None:
    for template in TEMPLATES.values():
        assert PromptTemplate.from_json(json.loads(json.dumps(template.as_json()))) == template
