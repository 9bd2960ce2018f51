"""A job's prompt as token ids, and how many tokens may follow it: what this model refuses is refused here.

Pure functions of job, tokenizer and model shape, called by `engine.text.prepare`. Every refusal is an
InvalidRequest with a stable code and the value, the limit and the fix. Knows nothing of the core.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.config import ModelSpec
from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer, eos_token_ids
from headrace.messages import Job, Kind

#: Output tokens of a text completion that names no max_tokens, as in OpenAI's API.
DEFAULT_COMPLETION_TOKENS = 16


def prompt_ids(
    job: Job, tokenizer: Tokenizer | None, spec: ModelSpec, limit: int
) -> tuple[list[int], int | None]:
    """Prompt ids, and for kind score the index of the first scored one."""
    if job.kind is Kind.SCORE:
        return _score_ids(job, tokenizer, spec, limit)
    if job.prompt_token_ids is not None:
        return job.prompt_token_ids, None
    if tokenizer is None:
        raise no_tokenizer("text")
    if job.messages is None:
        return tokenizer.encode_prompt(job.prompt or "", limit=limit), None
    turns = [
        {"role": m.role, "content": m.text} | ({"name": m.name} if m.name is not None else {})
        for m in job.messages
    ]
    return tokenizer.encode_chat(turns, limit=limit), None


def _score_ids(job: Job, tokenizer: Tokenizer | None, spec: ModelSpec, limit: int) -> tuple[list[int], int]:
    """Context and continuation, joined as lm-evaluation-harness joins them (`TemplateLM._encode_pair`):
    spaces that end the context go to the continuation, and two texts are tokenised as one, so that the
    continuation's first token is the one that the model would write.
    """
    context, target = job.prompt_token_ids, job.continuation_token_ids
    if tokenizer is None:
        if context is None or target is None:
            raise no_tokenizer("text")
    elif job.prompt is not None and job.continuation is not None:
        bare = job.prompt.rstrip(" ")
        continuation = job.prompt[len(bare) :] + job.continuation
        context = tokenizer.encode_prompt(bare, limit=limit)
        whole = tokenizer.encode_prompt(bare + continuation, limit=limit)
        target = whole[len(context) :] or tokenizer.encode(continuation, special=True)
    else:
        context = context or tokenizer.encode_prompt(job.prompt or "", limit=limit)
        target = target or tokenizer.encode(job.continuation or "", special=True)
    if not context:
        # Nothing stands before the continuation: begin with BOS, or with EOS, as the harness does.
        begin = tokenizer.bos_token_id if tokenizer else None
        eos = eos_token_ids(spec, tokenizer)
        context = [begin] if begin is not None else list(eos[:1])
    if not context or not target:
        raise InvalidRequest("empty_prompt", "a score needs at least one token on both sides")
    return context + target, len(context)


def output_tokens(job: Job, prompt: int, context_length: int) -> int:
    """Output tokens of each choice; 0 for a score."""
    room = context_length - prompt
    if room < (0 if job.kind is Kind.SCORE else 1):
        raise InvalidRequest(
            "prompt_too_long",
            f"prompt of {prompt} tokens does not fit the model's context of {context_length} together with "
            "an output token: shorten it",
        )
    if job.kind is Kind.SCORE:
        return 0
    asked = job.params.max_tokens
    if asked is None:
        asked = min(room, room if job.kind is Kind.CHAT else DEFAULT_COMPLETION_TOKENS)
    if asked > room:
        raise InvalidRequest(
            "max_tokens_too_large",
            f"max_tokens {asked} + prompt {prompt} exceeds the model's context of {context_length}: "
            "lower max_tokens or shorten the prompt",
        )
    if job.params.min_tokens > asked:
        raise InvalidRequest(
            "min_tokens_too_large",
            f"min_tokens {job.params.min_tokens} exceeds the {asked} output tokens that max_tokens allows "
            "by default here: lower it or set max_tokens",
        )
    return asked


def check_ids(ids: Iterable[int], where: str, spec: ModelSpec) -> None:
    """Refuse ids that the model's vocabulary does not have ("token_out_of_range")."""
    worst = max(ids, default=0)
    if worst >= spec.vocab_size:
        raise InvalidRequest(
            "token_out_of_range",
            f"token id {worst} in {where} is outside the model's vocabulary of {spec.vocab_size}: "
            f"ids go from 0 to {spec.vocab_size - 1}",
        )


def no_tokenizer(what: str) -> InvalidRequest:
    return InvalidRequest(
        "no_tokenizer",
        f"the model folder has no tokenizer files, so {what} cannot be used: send prompt_token_ids "
        "(and continuation_token_ids, stop_token_ids), or add tokenizer.json to the folder",
    )
