"""Bodies as clients of OpenAI and of other servers always send them, with fields that change nothing."""

import json
from typing import Any

import pytest

from api.contract.chat_request import ChatCompletionRequest
from api.contract.strict import parse

USER = [{"role": "user", "content": "hi"}]
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
    {
        **{"role": "assistant", "content": "ho", "refusal": None, "annotations": [], "audio": None},
        **{"function_call": None, "tool_calls": None, "reasoning_content": None, "parsed": None},
        **{"provider_specific_fields": {"refusal": None}, "thinking_blocks": None, "images": []},
    },
    {"role": "user", "content": "hi"},
]
BODIES: dict[str, dict[str, Any]] = {
    "GuideLLM": {
        **{"messages": USER, "stream": True, "max_completion_tokens": 9, "stop": None, "ignore_eos": True},
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "GuideLLM without counts": {
        **{"messages": USER, "stream": True, "max_completion_tokens": 9},
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    },
    "vLLM's benchmark": {
        **{"messages": USER, "temperature": 0.0, "repetition_penalty": 1.0, "stream": True, "top_p": 1.0},
        **{"max_completion_tokens": 9, "top_k": -1, "min_p": 0.0, "use_beam_search": False, "best_of": 1},
        **{"stop": [], "stop_token_ids": [], "bad_words": [], "length_penalty": 1.0, "priority": 0},
        **{"skip_special_tokens": True, "spaces_between_special_tokens": True, "logprobs": False},
    },
    "SGLang": {
        **{
            "messages": USER,
            "separate_reasoning": True,
            "stream_reasoning": True,
            "rid": None,
            "min_tokens": 0,
        },
        **{"no_stop_trim": False, "lora_path": None, "session_params": None, "return_hidden_states": False},
    },
    "lmdeploy": {
        **{"messages": USER, "session_id": -1, "do_preprocess": True, "ignore_eos": False, "top_k": 40},
        **{"repetition_penalty": 1.0, "skip_special_tokens": True, "min_new_tokens": None, "stream": False},
        **{"enable_thinking": None, "return_token_ids": False, "include_stop_str_in_output": False},
    },
    "llama.cpp's web page": {
        **{"messages": USER, "stream": True, "return_progress": True, "reasoning_format": "auto"},
        **{"max_tokens": -1, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95},
        **{"min_p": 0, "xtc_probability": 0, "xtc_threshold": 0.1, "typ_p": 1, "repeat_last_n": 64},
        **{"repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0},
        **{"dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "samplers": []},
        **{"timings_per_token": True, "cache_prompt": True},
    },
    "LiteLLM": {"messages": HISTORY, "extra_body": {}, "stream": False, "reasoning_effort": "low"},
    "LangChain": {
        **{"messages": USER, "n": 1, "stream": False, "temperature": 0.7, "parallel_tool_calls": False},
        **{"logit_bias": None, "stream_options": None},
    },
    "Open WebUI": {
        **{"messages": USER, "stream": True, "stop": ["END"], "frequency_penalty": 0.0, "seed": 0.0},
        **{"logit_bias": {}, "max_tokens": 150.0, "min_p": 0.0},
    },
    "Open WebUI with options of Ollama": {
        **{
            "messages": [{"id": "1", **USER[0]}],
            "num_ctx": 4096,
            "num_batch": 512,
            "num_gpu": 1,
            "num_thread": 8,
        },
        **{"num_keep": 24, "use_mmap": True, "use_mlock": False, "keep_alive": "5m", "think": False},
        **{"repeat_last_n": 64, "mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0, "tool_servers": []},
    },
    "SGLang's benchmark": {
        **{"messages": USER, "temperature": 0.0, "best_of": 1, "max_completion_tokens": 9, "stream": True},
        **{"ignore_eos": True, "lora_path": "m", "return_routed_experts": False},
    },
    "an agent of OpenAI's": {
        **{"messages": USER, "prompt_cache_retention": "24h", "prompt_cache_key": "k", "store": False},
        **{"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}, "verbosity": "low"},
        **{"reasoning_effort": "xhigh", "safety_identifier": "s", "service_tier": "auto"},
    },
}


@pytest.mark.parametrize("client", BODIES)
def test_the_body_that_a_client_always_sends_is_accepted(client: str) -> None:
    parse(ChatCompletionRequest, json.dumps({"model": "m", **BODIES[client]}).encode())
