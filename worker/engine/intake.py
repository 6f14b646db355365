"""Turns a new or resumed request into sequences, or into an error if the request can't run."""

import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from shared.errors import ContextLengthExceeded, GenerationFailed, InvalidRequest, LorelayError
from shared.messages import GenerationRequest, SamplingParams, StreamEvent, TextOrTokens
from worker.engine.message_output import MessageOutput
from worker.engine.ports import Model
from worker.engine.records import Prompts
from worker.engine.request_output import RequestOutput, SequenceOutput
from worker.engine.sequence import Sequence
from worker.engine.served_models import ServedModel
from worker.engine.tokenizer_port import Tokenizer


class Intake:
    """Checks requests against the limits of a model, and creates their sequences."""

    def __init__(self, model: Model, clock: Callable[[], float] = time.monotonic) -> None:
        """`model`: the model whose limits apply.

        `clock`: returns the time in seconds, for generation limits.
        """
        self._model = model
        self._clock = clock

    def encode(self, request: GenerationRequest) -> list[list[int]]:
        """Returns the token ids of each prompt, and compiles the grammar. May be called from any thread."""
        tokenizer = self._model.served.model_of(request).tokenizer
        if grammar := tokenizer.grammar_of(request):
            self._model.compile_grammar(grammar, tokenizer)
        if not request.prompts:
            return [tokenizer.encode_chat(request.messages, request.template_inputs, request.tenant)]
        return [
            tokenizer.encode_text(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in request.prompts
        ]

    def prepare(
        self, request: GenerationRequest, prompts: Prompts, events: Iterable[StreamEvent]
    ) -> RequestOutput:
        """Returns the `RequestOutput` of a request, whose sequences continue after the `events` of its log.

        Raises:
            LorelayError: the request can't run, or its log is invalid: it has more tokens than requested, or
                ids outside the vocabulary.
        """
        model = self._model.served.model_of(request)
        if isinstance(prompts, LorelayError):
            raise prompts
        self._check_tokens(request, prompts)
        sampling = msgspec.structs.replace(request.sampling, grammar=model.tokenizer.grammar_of(request))
        outputs = [
            self._sequence_output(request, sampling, model, index, prompts[index // request.n])
            for index in range(len(prompts) * request.n)
        ]
        output = RequestOutput(request, outputs, self._clock)
        output.resume(events)
        self._check_log(output)
        return output

    def _sequence_output(
        self,
        request: GenerationRequest,
        sampling: SamplingParams,
        model: ServedModel,
        index: int,
        prompt: list[int],
    ) -> SequenceOutput:
        seq = Sequence(
            request_id=request.request_id,
            index=index,
            adapter_name=request.adapter_name,
            sampling=sampling,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_tokens=self._num_tokens_to_generate(len(prompt), request),
            prompt_no=index // request.n,
            eos_token_ids=model.tokenizer.eos_token_ids,
            adapter_version=model.version if model.adapter_name else None,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
        )
        tokenizer = model.tokenizer
        marks = _marks(tokenizer.special_tokens, request)
        if parser := None if request.prompts else tokenizer.message_parser(request, index, prompt):
            return MessageOutput(seq, tokenizer, parser, request.tool_choice, marks)
        prefix = _text_of(request.prompts[seq.prompt_no], tokenizer) if request.echo else ""
        return SequenceOutput(seq, tokenizer, marks, prefix)

    def _check_tokens(self, request: GenerationRequest, prompts: list[list[int]]) -> None:
        """Refuses token ids outside the vocabulary, which would make a step of all running requests fail.

        Raises:
            InvalidRequest: a prompt is empty, or a token id is beyond the vocabulary.
        """
        param = "prompt" if request.prompts else "messages"
        if not all(prompts):
            raise InvalidRequest("The prompt has no tokens.", param=param)
        if any(map(self._lacks, prompts)):
            raise InvalidRequest("The prompt has a token id that the model lacks.", param=param)
        sampling = request.sampling
        named = {"logit_bias": [*sampling.logit_bias], "allowed_token_ids": [*sampling.allowed_token_ids]}
        named["stop_token_ids"] = [*sampling.stop_token_ids]
        for field, token_ids in named.items():
            if self._lacks(token_ids):
                raise InvalidRequest(f"'{field}' names a token id that the model lacks.", param=field)

    def _check_log(self, output: RequestOutput) -> None:
        """Refuses a log that can't be continued. No worker writes such a log, but another program may.

        Raises:
            GenerationFailed: the log has more tokens than requested, or ids outside the vocabulary.
        """
        running = output.sequences
        if not running or any(seq.num_output_tokens >= seq.max_tokens for seq in running):
            raise GenerationFailed("The log of the request can't be read: more tokens than were asked for.")
        if any(self._lacks(seq.output_token_ids) for seq in running):
            raise GenerationFailed("The log of the request can't be read: a token that the model lacks.")

    def _lacks(self, token_ids: list[int]) -> bool:
        """True if one of these token ids is outside the model's vocabulary."""
        return bool(token_ids) and not (min(token_ids) >= 0 and max(token_ids) < self._model.vocab_size)

    def _num_tokens_to_generate(self, num_prompt_tokens: int, request: GenerationRequest) -> int:
        sampling, context = request.sampling, self._model.max_model_len
        asked = sampling.max_tokens or sampling.min_tokens
        if num_prompt_tokens + (asked or 1) > context:
            raise _too_long(num_prompt_tokens, request, context)
        return sampling.max_tokens or context - num_prompt_tokens


def _text_of(prompt: TextOrTokens, tokenizer: Tokenizer) -> str:
    """Returns the text of a prompt; leaves out special tokens if the prompt consists of token ids."""
    if isinstance(prompt, str):
        return prompt
    detokenizer = tokenizer.detokenizer()
    return "".join(map(detokenizer.add, prompt))


def _marks(special_tokens: Mapping[int, str], request: GenerationRequest) -> Mapping[int, str]:
    """Returns the special tokens that the request's stop strings contain."""
    stop = request.sampling.stop
    return {token_id: text for token_id, text in special_tokens.items() if any(text in word for word in stop)}


def _too_long(num_prompt_tokens: int, request: GenerationRequest, context: int) -> ContextLengthExceeded:
    """Returns the error for a request longer than the context; the error names the field to change."""
    sampling = request.sampling
    asked = sampling.max_tokens or sampling.min_tokens
    completion = f" and {asked} for the completion" if asked else ""
    is_minimum = not sampling.max_tokens and num_prompt_tokens < context
    given_in, param = ("prompt", "prompt") if request.prompts else ("messages", None)
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens, but {num_prompt_tokens} tokens "
        f"were given in the {given_in}{completion}{' (min_tokens)' if is_minimum else ''}.",
        param="min_tokens" if is_minimum else param,
    )
