"""Fields that other servers add to OpenAI's chat completion, and that their clients send to any server.

Some clients always send such a field, with a value that has no effect. This value is accepted, and any other
value is refused. Most of these fields have no description here, because the documentation of the other
servers describes them.
"""

from typing import Annotated, Any

from api.contract.fields import IGNORED, INTEGRAL, Only
from api.contract.strict import StrictModel

FROM_KWARGS = "use chat_template_kwargs"
ONCE_HERE = "send its fields themselves: OpenAI's Python client does so with this argument"


class VllmFields(StrictModel):
    """Fields of vLLM, including its earlier releases."""

    length_penalty: Annotated[Any, Only(1)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    best_of: Annotated[Any, Only(1)] = None
    watermarking: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[bool | None, Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    truncate_prompt_tokens: Annotated[Any, Only()] = None
    truncation_side: Annotated[Any, Only()] = None
    prompt_logprobs: Annotated[Any, Only()] = None
    logprob_token_ids: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([])] = None
    echo: Annotated[Any, Only(False)] = None
    add_special_tokens: Annotated[Any, Only(False)] = None
    documents: Annotated[Any, Only([])] = None
    chat_template: Annotated[Any, Only()] = None
    media_io_kwargs: Annotated[Any, Only({})] = None
    mm_processor_kwargs: Annotated[Any, Only({})] = None
    structural_tag: Annotated[Any, Only()] = None
    thinking_token_budget: Annotated[Any, Only()] = None
    include_reasoning: Annotated[Any, Only(True)] = None
    priority: Annotated[Any, Only(0)] = None
    request_id: Annotated[Any, Only(instead="the answer has the id")] = None
    return_tokens_as_token_ids: Annotated[Any, Only(False)] = None
    return_token_ids: Annotated[Any, Only(False)] = None
    return_token_offsets: Annotated[Any, Only(False)] = None
    return_prompt_text: Annotated[Any, Only(False)] = None
    return_mm_kwargs: Annotated[Any, Only(True)] = None
    routed_experts_prompt_start: Annotated[Any, Only(0)] = None
    kv_transfer_params: Annotated[Any, Only({})] = None
    ec_transfer_params: Annotated[Any, Only({})] = None
    vllm_xargs: Annotated[Any, Only({})] = None
    repetition_detection: Annotated[Any, Only()] = None
    stream_interval: Annotated[Any, Only(1)] = None


class SglangFields(StrictModel):
    """Fields of SGLang that vLLM doesn't have."""

    stop_regex: Annotated[Any, Only([])] = None
    no_stop_trim: Annotated[Any, Only(False)] = None
    separate_reasoning: Annotated[Any, Only(True)] = None
    stream_reasoning: Annotated[Any, Only(True)] = None
    session_params: Annotated[Any, Only({})] = None
    input_ids: Annotated[Any, Only()] = None
    rid: Annotated[Any, Only(instead="the answer has the id")] = None
    extra_key: Annotated[Any, Only()] = None
    task: Annotated[Any, Only()] = None
    custom_logit_processor: Annotated[Any, Only()] = None
    custom_params: Annotated[Any, Only({})] = None
    ngram_corpus_id: Annotated[Any, Only()] = None
    images_config: Annotated[Any, Only({})] = None
    max_dynamic_patch: Annotated[Any, Only()] = None
    min_dynamic_patch: Annotated[Any, Only()] = None
    use_audio_in_video: Annotated[Any, Only(False)] = None
    return_hidden_states: Annotated[Any, Only(False)] = None
    return_routed_experts: Annotated[Any, Only(False)] = None
    routed_experts_start_len: Annotated[Any, Only(0)] = None
    return_cached_tokens_details: Annotated[Any, Only(False)] = None
    return_prompt_token_ids: Annotated[Any, Only(False)] = None
    return_meta_info: Annotated[Any, Only(False)] = None
    bootstrap_host: Annotated[Any, Only()] = None
    bootstrap_port: Annotated[Any, Only()] = None
    bootstrap_room: Annotated[Any, Only()] = None
    routed_dp_rank: Annotated[Any, Only()] = None
    disagg_prefill_dp_rank: Annotated[Any, Only()] = None
    data_parallel_rank: Annotated[Any, Only()] = None


class LmdeployFields(StrictModel):
    """Fields of lmdeploy that vLLM and SGLang don't have."""

    session_id: Annotated[Annotated[int, INTEGRAL] | None, Only(-1)] = None
    do_preprocess: Annotated[Any, Only(True)] = None


class LlamaCppFields(StrictModel):
    """Fields of llama.cpp's server, which its web page and its clients send."""

    cache_prompt: Annotated[bool | None, IGNORED] = None
    """Reuse of the prefix of the prompt before; Lorelay's prefix cache reuses all prefixes."""
    return_progress: Annotated[bool | None, IGNORED] = None
    """Progress of the prefill in the stream, which llama.cpp's web page shows if it comes."""
    timings_per_token: Annotated[bool | None, IGNORED] = None
    """Speed of the server in each chunk, which llama.cpp's web page shows if it comes."""
    reasoning_format: Annotated[str | None, IGNORED] = None
    """Field for a model's reasoning; here it stays in `content`."""
    repeat_last_n: Annotated[Any, IGNORED] = None
    """Length of text for `repeat_penalty`."""
    dynatemp_exponent: Annotated[Any, IGNORED] = None
    """Parameter of `dynatemp_range`."""
    xtc_threshold: Annotated[Any, IGNORED] = None
    """Parameter of `xtc_probability`."""
    dry_base: Annotated[Any, IGNORED] = None
    """Parameter of `dry_multiplier`."""
    dry_allowed_length: Annotated[Any, IGNORED] = None
    """Parameter of `dry_multiplier`."""
    dry_penalty_last_n: Annotated[Any, IGNORED] = None
    """Parameter of `dry_multiplier`."""
    dry_sequence_breakers: Annotated[Any, IGNORED] = None
    """Parameter of `dry_multiplier`."""
    mirostat_tau: Annotated[Any, IGNORED] = None
    """Parameter of `mirostat`."""
    mirostat_eta: Annotated[Any, IGNORED] = None
    """Parameter of `mirostat`."""
    adaptive_decay: Annotated[Any, IGNORED] = None
    """Parameter of `adaptive_target`."""
    dynatemp_range: Annotated[Any, Only(0)] = None
    xtc_probability: Annotated[Any, Only(0)] = None
    dry_multiplier: Annotated[Any, Only(0)] = None
    mirostat: Annotated[Any, Only(0)] = None
    adaptive_target: Annotated[Any, Only(-1)] = None
    top_n_sigma: Annotated[Any, Only(-1, 0)] = None
    typical_p: Annotated[Any, Only(1)] = None
    typ_p: Annotated[Any, Only(1)] = None
    samplers: Annotated[Any, Only([])] = None
    backend_sampling: Annotated[Any, Only(False)] = None
    min_keep: Annotated[Any, Only(0)] = None
    n_predict: Annotated[Any, Only(-1, instead="use max_tokens")] = None
    n_keep: Annotated[Any, Only(0)] = None
    n_discard: Annotated[Any, Only(0)] = None
    n_indent: Annotated[Any, Only(0)] = None
    n_probs: Annotated[Any, Only(0)] = None
    post_sampling_probs: Annotated[Any, Only(False)] = None
    t_max_predict_ms: Annotated[Any, Only(0, -1)] = None
    id_slot: Annotated[Any, Only(-1)] = None
    lora: Annotated[Any, Only([], instead="name the adapter as model")] = None
    response_fields: Annotated[Any, Only([])] = None
    return_tokens: Annotated[Any, Only(False)] = None
    parse_tool_calls: Annotated[Any, Only(False)] = None
    thinking_forced_open: Annotated[Any, Only(False)] = None
    thinking_budget_tokens: Annotated[Any, Only(-1)] = None


class OllamaFields(StrictModel):
    """Options of Ollama, which Open WebUI sends to any server if a user has set them."""

    num_ctx: Annotated[Any, IGNORED] = None
    """Size of Ollama's context; here it is the model's."""
    num_batch: Annotated[Any, IGNORED] = None
    """Size of a prefill chunk in Ollama's process."""
    num_keep: Annotated[Any, IGNORED] = None
    """Tokens that stay when Ollama cuts a context; here none is cut."""
    num_gpu: Annotated[Any, IGNORED] = None
    """Layers on the GPU in Ollama's process."""
    main_gpu: Annotated[Any, IGNORED] = None
    """Device of Ollama's process."""
    num_thread: Annotated[Any, IGNORED] = None
    """Threads of Ollama's process."""
    numa: Annotated[Any, IGNORED] = None
    """Memory of Ollama's process."""
    low_vram: Annotated[Any, IGNORED] = None
    """Memory of Ollama's process."""
    use_mmap: Annotated[Any, IGNORED] = None
    """Memory of Ollama's process."""
    use_mlock: Annotated[Any, IGNORED] = None
    """Memory of Ollama's process."""
    keep_alive: Annotated[Any, IGNORED] = None
    """Time for which Ollama keeps a model loaded; here it stays."""
    penalize_newline: Annotated[Any, IGNORED] = None
    """Parameter of `repeat_penalty`."""
    num_predict: Annotated[Any, Only(-1, instead="use max_tokens")] = None
    tfs_z: Annotated[Any, Only(1)] = None
    format: Annotated[Any, Only("")] = None
    think: Annotated[Any, Only(False, instead=FROM_KWARGS)] = None
    options: Annotated[Any, Only({}, instead="send its fields themselves")] = None


class GatewayFields(StrictModel):
    """Fields of LiteLLM, OpenRouter and hosted models, and client options that users put into a body."""

    thinking: Annotated[Any, Only({"type": "disabled"}, instead=FROM_KWARGS)] = None
    reasoning: Annotated[Any, Only({}, instead=FROM_KWARGS)] = None
    thinking_budget: Annotated[Any, Only(instead=FROM_KWARGS)] = None
    include: Annotated[Any, Only([])] = None
    tool_servers: Annotated[Any, Only([])] = None
    extra_body: Annotated[Any, Only({}, instead=ONCE_HERE)] = None
    extra_headers: Annotated[Any, Only({}, instead="send them as headers")] = None
    extra_query: Annotated[Any, Only({}, instead="send them in the URL")] = None
    timeout: Annotated[Any, Only(instead="set it in the client")] = None
    max_retries: Annotated[Any, Only(0, instead="set it in the client")] = None


class ExtensionFields(GatewayFields, OllamaFields, LlamaCppFields, LmdeployFields, SglangFields, VllmFields):
    """All fields of other servers and their clients that Lorelay refuses or ignores."""
