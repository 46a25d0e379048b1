"""What each setting means, who reads it and on which providers it acts. Knows words; knows no types and no values."""

from __future__ import annotations

from autobot_llm.settings.meaning import (
    ANTHROPIC,
    CLOUD,
    ENGINES,
    LOCAL,
    NATIVE,
    OLLAMA,
    OPENAI,
    OVER_HTTP,
    PAID,
    VLLM,
    About,
    proxy,
)

ABOUT: dict[str, About] = {
    # Providers and models
    "provider": About("Provider that answers by default.", "interface", variable="AUTOBOT_LLM_PROVIDER"),
    "default_model": About(
        "Model that answers by default: the embedded `tiny`, or the path of a model folder; the name of a model where "
        "another provider answers. Ollama's is `mistral:7b-instruct-q4_K_M` unless this is set.",
        "interface, providers/native, providers/ollama",
        variable="AUTOBOT_DEFAULT_LLM_MODEL",
    ),
    "models": About(
        "Model for one `llm_type`: AUTOBOT_CHAT_MODEL for chat, AUTOBOT_RAG_MODEL for rag, and so on for any name.",
        "routing",
        variable="AUTOBOT_<TYPE>_MODEL",
    ),
    "timeout": About(
        "Seconds that one whole answer may take, unless the request has its own timeout; off for no limit.",
        "interface",
        variable="AUTOBOT_LLM_TIMEOUT",
    ),
    "ollama_endpoint": About("Where Ollama listens.", "providers/ollama", OLLAMA),
    "ollama_keep_alive": About(
        "How long Ollama keeps a model in memory after a request, negative for ever; off leaves it to the server's own "
        "OLLAMA_KEEP_ALIVE. A loaded model's stay that is longer already is not cut short.",
        "providers/ollama",
        OLLAMA,
    ),
    "vllm_endpoints": About(
        "Where vLLM servers listen, separated by commas; several share the requests.", "providers/vllm", VLLM
    ),
    "vllm_api_key": About(
        "Key for vLLM servers that were started with --api-key.", "providers/vllm", VLLM, secret=True
    ),
    "openai_endpoint": About(
        "OpenAI's base address, or Azure's (https://NAME.openai.azure.com/openai/v1).",
        "providers/openai",
        OPENAI,
    ),
    "anthropic_endpoint": About("Anthropic's base address.", "providers/anthropic", ANTHROPIC),
    "clouds": About(
        "Base address of a named OpenAI-compatible cloud; its key is AUTOBOT_CLOUD_<NAME>_API_KEY.",
        "providers/openai",
        CLOUD,
        variable="AUTOBOT_CLOUD_<NAME>_ENDPOINT",
    ),
    "openai_api_key": About("Key for OpenAI.", "providers/openai", OPENAI, secret=True, variable="OPENAI_API_KEY"),
    "anthropic_api_key": About(
        "Key for Anthropic.", "providers/anthropic", ANTHROPIC, secret=True, variable="ANTHROPIC_API_KEY"
    ),
    # Server
    "host": About("Address the server listens on; the default is this machine only.", "server"),
    "port": About("Port the server listens on; 0 takes a free one.", "server"),
    "api_keys": About(
        "Keys of which a client of the server must send one, separated by commas; unset asks for none.",
        "server",
        secret=True,
        alias="AUTOBOT_API_KEY",
    ),
    "max_body_bytes": About("Largest request body that the server accepts.", "server"),
    "shutdown_grace": About("Seconds that running answers may still take when the server stops.", "server"),
    "log_level": About("Least important log messages that are still written.", "cli, server"),
    # Our own engine
    "device": About("Where the engine computes.", "providers/native", NATIVE),
    "compiled_step": About(
        "Compiled decode step on a CPU: auto uses it where there is a compiler, on insists on it.",
        "engine/kernels/cpu",
        NATIVE,
    ),
    "cpu_threads": About("Threads of the engine; unset measures.", "providers/native", NATIVE),
    "max_model_len": About(
        "Most tokens of prompt and answer together; unset takes the model's own limit.",
        "providers/native",
        LOCAL,
    ),
    "max_queued_requests": About(
        "Requests that may wait for the engine; one more is refused with status 429.",
        "providers/native",
        NATIVE,
    ),
    "workload": About(
        "What the batching is tuned for: short waits, much work at once, or both; "
        "it chooses what the four settings below leave open.",
        "engine/batching",
        ENGINES,
    ),
    "max_num_seqs": About("Most sequences computed together; unset takes the workload's.", "engine/batching", ENGINES),
    "max_num_batched_tokens": About(
        "Most tokens computed in one step; unset takes the workload's.", "engine/batching", ENGINES
    ),
    "max_waiting_time_ms": About(
        "Milliseconds that the prompts of others may delay an answer's next token; unset takes the workload's.",
        "engine/batching",
        NATIVE,
    ),
    "scheduling_policy": About(
        "Who is served first: fcfs, who came first; priority, who has the lowest `priority` in the request; "
        "unset takes the workload's.",
        "engine/batching",
        ENGINES,
    ),
    "preemption": About(
        "What becomes of an interrupted answer's keys and values when the KV cache is full: recompute drops them, swap "
        "keeps them in the host's memory, auto swaps on a GPU.",
        "engine/batching",
        NATIVE,
    ),
    "swap_memory": About(
        "Most memory of the host that interrupted answers may take; what does not fit is recomputed.",
        "engine/batching",
        NATIVE,
    ),
    "kv_cache_memory": About(
        "Memory of the KV cache; unset: on a CPU 16 sequences of full length, within a quarter of the free memory; on "
        "a GPU what AUTOBOT_GPU_MEMORY_UTILIZATION leaves.",
        "engine/kv_cache",
        NATIVE,
    ),
    "gpu_memory_utilization": About("Share of a GPU's memory that the engine may use.", "engine/memory", ENGINES),
    "prefix_caching": About(
        "Reuse what was computed for an equal beginning of a prompt of the same tenant; for Anthropic, mark the "
        "beginning that stays the same, so that its cache keeps it.",
        "engine/kv_cache, providers/anthropic",
        NATIVE | ANTHROPIC,
    ),
    "cached_prefixes": About(
        "System prompts that stay in the KV cache, for every tenant (of each key in AUTOBOT_API_KEYS).",
        "engine/kv_cache",
        NATIVE,
    ),
    "warm_prefixes": About(
        "Compute AUTOBOT_CACHED_PREFIXES at the start; false leaves that to the first requests, and keeps nothing "
        "longer than others.",
        "providers/native",
        NATIVE,
    ),
    "attention_backend": About("Attention kernels on a GPU; auto chooses by hardware.", "engine/attention", ENGINES),
    "cuda_graphs": About(
        "Replay decoding, and up to 1,024 tokens with prompts, as CUDA graphs; on refuses attention that cannot be.",
        "engine/gpu",
        ENGINES,
    ),
    "cache_dir": About(
        "Where compiled kernels, kept answers and other files that can be made again are.",
        "engine/kernels, universal/response_cache",
    ),
    "kv_cache_dtype": About(
        "How keys and values are stored; auto is the model's own type, int8 and fp8 are lossy.",
        "engine/kv_cache",
        LOCAL,
        told_on=OLLAMA,
    ),
    "kv_sliding_window": About(
        "Tokens that attention looks back at most (lossy); 0 is the model's own window. What no layer looks back to "
        "leaves the cache.",
        "engine/kv_cache",
        NATIVE,
    ),
    "kv_heavy_hitters": About(
        "Tokens of a sequence that stay in the KV cache, half of them recent ones, half those of the others that were "
        "attended to most (lossy); up to 1 it is a share of the context, 0 is off. On a CPU, without prefix caching "
        "and speculation.",
        "engine/kv_cache",
        NATIVE,
    ),
    # Speculation
    "speculation_enabled": About(
        "Guess several tokens ahead and verify them in one step; the answers stay the same.",
        "engine/speculative, tuning/knobs",
        ENGINES,
    ),
    "speculation_method": About(
        "Who guesses: ngram (the text itself), draft (a small model), medusa or eagle3 (heads of the model), none; "
        "auto takes whatever pays by measured acceptance and costs. On vLLM auto is the draft model where one is "
        "named, else nobody.",
        "engine/speculative, tuning/knobs",
        ENGINES,
    ),
    "speculation_draft_model": About(
        "Model that drafts: on our own engine a folder, with the model's own vocabulary; unset takes the recommended "
        "one where it lies beside the model.",
        "engine/speculative, tuning/knobs",
        ENGINES,
    ),
    "speculation_heads": About(
        "Folder of Medusa heads or of an EAGLE-3 draft of the model, for the methods medusa, eagle3 and auto; unset "
        "takes `<model>-medusa` or `<model>-eagle3` beside the model.",
        "engine/speculative",
        NATIVE,
    ),
    "speculation_num_tokens": About(
        "Most tokens drafted at a time; of a tree, its depth: on a GPU EAGLE-3 gains by 6.",
        "engine/speculative, tuning/knobs",
        ENGINES,
    ),
    "speculation_use_ngram": About(
        "Let earlier text of the request itself serve as a draft; on vLLM only where it is set, because vLLM cannot "
        "switch it off where it loses.",
        "engine/speculative, tuning/knobs",
        ENGINES,
    ),
    "speculation_min_acceptance_rate": About(
        "Share of accepted tokens below which drafting stops; unset decides by measured cost.",
        "engine/speculative",
        NATIVE,
    ),
    # Quantization
    "quantization_type": About(
        "How weights are stored (lossy): int8 quantizes the activations too, int4 the weights only. Our engine makes "
        "int8, int4 and fp8 at load, gptq and awq once, in the cache directory.",
        "engine/quantization, tuning/knobs",
        ENGINES,
    ),
    "quantization_calibration": About(
        "A text like those that the model will see: gptq and awq need one, int8 gains from it. It is read once; the "
        "quantized model is kept in the cache directory.",
        "providers/native",
        NATIVE,
    ),
    "llm_compressor": About(
        "Who quantizes into a folder: our own quantizers (off), which lost less of the embedded model, llm-compressor "
        "where its environment was made before (installed), or made now (install: 1.5 GB in the cache directory).",
        "providers/native",
        NATIVE,
    ),
    "use_quantized_models": About(
        "Prefer a known quantized variant of a model where there is one (lossy): Ollama's tags; beside a folder of our "
        "engine's one named like it with -int8, -fp8, -gptq, -awq or -int4.",
        "providers/native, providers/ollama",
        NATIVE | OLLAMA,
    ),
    # vLLM
    "vllm_multi_step": About(
        "Steps that a vLLM which we start plans at a time; none since 0.10.1 does.", "tuning/knobs", VLLM
    ),
    "vllm_prefix_caching": About("Let a vLLM which we start reuse equal beginnings of prompts.", "tuning/knobs", VLLM),
    "vllm_async_output": About("Let a vLLM which we start overlap output with computing.", "tuning/knobs", VLLM),
    # Everything over HTTP
    "cloud_connection_pool_size": About("Most connections to one provider.", "transport/pool", OVER_HTTP),
    "cloud_connection_max_age": About(
        "Seconds until a connection is made anew, which follows the DNS; or off.", "transport/pool", OVER_HTTP
    ),
    "cloud_http_version": About(
        "HTTP over TLS: auto lets the server choose; 2 accepts nothing else.", "transport/dial", OVER_HTTP
    ),
    "cloud_warm_up": About("Connect to every provider that is set up, at the start.", "cloud/warm_up", PAID),
    "https_proxy": proxy("HTTP proxy for https addresses, loopback excepted.", secret=True, variable="HTTPS_PROXY"),
    "http_proxy": proxy("HTTP proxy for http addresses, loopback excepted.", secret=True, variable="HTTP_PROXY"),
    "no_proxy": proxy("Domains, addresses and networks reached without a proxy, by commas.", variable="NO_PROXY"),
    "cloud_batch_window_ms": About(
        "Milliseconds to wait, while a call is under way, for embeddings that can share the next one.",
        "cloud/request_batching",
        OVER_HTTP,
    ),
    "cloud_max_batch_size": About(
        "Most requests for embeddings that share a call; 1 is off.", "cloud/request_batching", OVER_HTTP
    ),
    "cloud_retry_max_attempts": About(
        "Most retries of a call that failed and may be made again; 0 is off.", "cloud/retry", OVER_HTTP
    ),
    "cloud_max_queued_requests": About(
        "Requests that may wait for the rate limit of one model; one more is refused with status 429.",
        "cloud/rate_limits",
        OVER_HTTP,
    ),
    "cloud_rate_limits": About(
        "Limits per minute that hold whatever the provider tells: `openai/gpt-5.4 500rpm 200000tpm, groq/* 30rpm`; "
        "`groq/*` is each model of a provider by itself. With AUTOBOT_REDIS_URL all workers share them.",
        "cloud/rate_limits",
        OVER_HTTP,
    ),
    "cloud_batch_completions": About(
        "Let completions of plain prompts that are not streamed wait AUTOBOT_CLOUD_BATCH_WINDOW_MS for others like "
        "them, to go in one call (OpenAI's, vLLM's and compatible servers). Chats never wait.",
        "cloud/batched_completions",
        OVER_HTTP,
    ),
    "cloud_hedging": About(
        "Send a call a second time when its answer has not begun after the time within which 95 % of the model's do; "
        "the first to begin answers. `deterministic`: where temperature is 0 or there is a seed; `all`: others, too. "
        "At most 5 % more calls, which cost what they cost.",
        "cloud/hedged",
        OVER_HTTP,
    ),
    "fallbacks": About(
        "Models that answer where another one cannot: `openai/gpt-5.4 > anthropic/claude-sonnet-5, * > native/tiny`. "
        "The first is a model, `openai/*` or `*`; the answer says that another model gave it.",
        "cloud/fallback",
    ),
    "cloud_prices": About(
        'JSON file of prices that replace ours: `{"openai/gpt-5.5": {"input": 5, "output": 30, "cached_input": 0.5, '
        '"dated": "2026-11-20"}}`, US dollars per million tokens.',
        "cloud/pricing",
        PAID,
    ),
    "batch_dir": About(
        "Folder of what is known of batch jobs, which nothing can make again; unset is `batches` under "
        "AUTOBOT_CACHE_DIR.",
        "cloud/batch_jobs",
        PAID,
    ),
    "cloud_budget_per_day": About(
        "US dollars that a day (UTC) may cost; a request that could cost more than is left is refused with status 402.",
        "cloud/costed",
        PAID,
    ),
    "cloud_budget_per_month": About("US dollars that a month (UTC) may cost.", "cloud/costed", PAID),
    # Every provider
    "prompt_compression_enabled": About(
        "Shorten the system prompts of all requests by rules (lossy); a request may ask for it, or for more, itself.",
        "universal/prompt_compression",
    ),
    "prompt_compression_ratio": About(
        "Length of a compressed prompt as a share of the original; rules stop short of it where there is no more to "
        "remove.",
        "universal/prompt_compression",
    ),
    "cache_enabled": About(
        "Answer a repeated request from a cache: one with temperature 0, with a seed, or that asks for it in `cache`.",
        "universal/response_cache",
    ),
    "cache_l1_size": About("Answers kept in memory; 0 keeps none there.", "universal/response_cache"),
    "cache_l2_ttl": About(
        "Seconds that an answer is kept, in memory and in the shared store.", "universal/response_cache"
    ),
    "redis_url": About(
        "Redis for what workers and hosts share: kept answers (unset: a file under AUTOBOT_CACHE_DIR), rate limits "
        "(unset: each worker's own) and budgets (unset: those of one user on one machine).",
        "universal/response_cache",
        secret=True,
    ),
    "embedding_cache_size": About(
        "Vectors kept in memory, so that a text is embedded once; 0 keeps none there.",
        "universal/embedding_cache",
    ),
    "embedding_cache_ttl": About(
        "Seconds that a vector is kept, in memory and in the shared store.", "universal/embedding_cache"
    ),
    "semantic_cache_threshold": About(
        "Similarity from which the kept answer to the same question in other words is given (lossy), 0.95 for one; "
        "unset is off. AUTOBOT_EMBEDDING_MODEL says who makes the vectors, the default provider unless it is set.",
        "universal/semantic",
    ),
}
