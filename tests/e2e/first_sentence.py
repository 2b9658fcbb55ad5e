"""A reasoning parser for a model that was never taught to reason: it thinks for one sentence.

vLLM loads this file by `--reasoning-parser-plugin`.  Both tokens are in SmolLM2's vocabulary, so
thoughts end where the model ends a sentence, and whatever a prompt has before its last message
counts for nothing.
"""

from __future__ import annotations

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser


@ReasoningParserManager.register_module("first_sentence")
class FirstSentenceParser(DeepSeekR1ReasoningParser):
    """Everything up to the first full stop of a message is reasoning."""

    @property
    def start_token(self) -> str:
        """Of a message, which the template has written."""
        return "<|im_start|>"

    @property
    def end_token(self) -> str:
        """Of a sentence."""
        return "."
