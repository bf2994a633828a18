"""vLLM's engine in this process, as a calibration uses it."""

from collections.abc import Sequence
from typing import Any

from ouro_runtime.config import GATE
from ouro_server.calibrate.errors import CalibrationError
from ouro_server.calibrate.questions import Question
from ouro_server.calibrate.run import Answer
from ouro_server.choices import chosen, pass_params
from ouro_server.vllm_api import SamplingParams


class VllmEngine:
    """Greedy answers of an `LLM`, without penalties, whatever generation_config.json says."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.loops: int = llm.model_config.hf_config.total_ut_steps

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids as the server would make them."""
        longest = self.llm.model_config.max_model_len
        found = [self._tokens(question) for question in questions]
        for question, tokens in zip(questions, found, strict=True):
            if len(tokens) + 2 > longest:
                raise CalibrationError(
                    f"line {question.line}: {len(tokens)} tokens leave no room for an answer in "
                    f"the model's {longest} (--max-model-len)"
                )
        return found

    def _tokens(self, question: Question) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        if question.prompt is not None:
            return list(tokenizer.encode(question.prompt))
        try:
            text = tokenizer.apply_chat_template(
                list(question.messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the checkpoint's template raises
            raise CalibrationError(f"line {question.line}: messages: {error}") from None
        return list(tokenizer.encode(text, add_special_tokens=False))

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str,
        threshold: float,
        max_tokens: int,
        rule: str = GATE,
    ) -> list[Answer]:
        longest = self.llm.model_config.max_model_len
        depth = {
            "exit_rule": rule,
            "exit_threshold": threshold,
            "exit_mode": mode,
            "min_loops": 1,
            "max_loops": self.loops,
        }
        params = [
            SamplingParams(
                temperature=0,
                # One less than fits: `choices` asks for a token after the answer.
                max_tokens=min(max_tokens, longest - len(prompt) - 1),
                extra_args=dict(depth),
            )
            for prompt in prompts
        ]
        outputs = [answer.outputs[0] for answer in self._generate(prompts, params)]
        return [Answer(list(o.token_ids), list(o.depths), o.text) for o in outputs]

    def choices(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[bool]]:
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        passes = self._generate(whole, [pass_params() for _ in whole])
        return [
            chosen(answer, made.prompt_logprobs[len(prompt) :])
            for prompt, answer, made in zip(prompts, answers, passes, strict=True)
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)
