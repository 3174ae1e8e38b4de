"""Tiny configurations of every family, three or more each: sizes that do not divide, scalings, windows, biases.

Texts are longer than every window and than ``original_max_position_embeddings``; eps, theta and scales are not the
defaults, because a default that is forgotten cannot be seen.
"""

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
WHOLE_YARN = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}
LINEAR = {"rope_type": "linear", "factor": 2.5}
PLAIN = {"rope_type": "default"}


def sizes(width=24, heads=3, kv_heads=1, head_dim=10, layers=2, theta=1e4, eps=1e-2, rope=PLAIN, **more):
    out = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    out |= {"num_hidden_layers": layers, "rms_norm_eps": eps, "rope_parameters": rope | {"rope_theta": theta}}
    return out | {"intermediate_size": 26, "max_position_embeddings": 96} | more


def gpt2(width=24, heads=3, **more):
    out = {"n_embd": width, "n_head": heads, "n_layer": 2, "n_positions": 96, "layer_norm_epsilon": 1e-2}
    return out | more


SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3_ROPES = {
    FULL: LINEAR | {"rope_theta": 1e6},
    SLIDING: PLAIN | {"rope_theta": 1e3},
}
LONGROPE = {  # of 4 pairs
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 3.0, 5.0],
    "original_max_position_embeddings": 8, "partial_rotary_factor": 1.0,
}  # fmt: skip

CASES = {
    "llama/one kv head, tied": ("llama", sizes(tie_word_embeddings=True, theta=5e5)),
    "llama/biases, all kv heads": ("llama", sizes(20, 4, 4, 6, attention_bias=True, mlp_bias=True, eps=1e-5)),
    "llama/llama3": ("llama", sizes(32, 4, 2, 8, 3, rope=LLAMA3, theta=5e5)),
    "llama/yarn": ("llama", sizes(32, 4, 2, 8, rope=YARN)),
    "llama/yarn, every field": ("llama", sizes(32, 4, 2, 12, rope=WHOLE_YARN)),
    "llama/yarn, mscale": ("llama", sizes(32, 4, 2, 12, rope=MSCALE)),
    "llama/linear, gelu": ("llama", sizes(rope=LINEAR, hidden_act="gelu")),
    "mistral/window": ("mistral", sizes(sliding_window=5)),
    "mistral/no window": ("mistral", sizes(32, 4, 2, 8, sliding_window=None, tie_word_embeddings=True)),
    # not of one: there, transformers' cache keeps nothing, and its texts are not those of its own logits
    "mistral/window of two": ("mistral", sizes(20, 6, 2, 4, 3, sliding_window=2, theta=1e6)),
    "qwen2/biases": ("qwen2", sizes(theta=1e6)),
    "qwen2/window from layer 1": (
        "qwen2", sizes(32, 4, 2, 8, 3, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen2/yarn, tied": ("qwen2", sizes(20, 4, 4, 6, rope=YARN, tie_word_embeddings=True)),
    "qwen3/one kv head": ("qwen3", sizes(18, 3, 1, 8, theta=5e5)),
    "qwen3/all kv heads, tied": ("qwen3", sizes(32, 4, 4, 8, theta=1e6, eps=1e-6, tie_word_embeddings=True)),
    "qwen3/biases, window": (
        "qwen3",
        sizes(20, 6, 2, 4, 3, attention_bias=True, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    ),
    "gemma2/caps": (
        "gemma2",
        sizes(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=7, sliding_window=5),
    ),
    "gemma2/no caps": (
        "gemma2",
        sizes(32, 4, 2, 8, 3, attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=16,
              sliding_window=4, tie_word_embeddings=False),
    ),
    "gemma2/biases, layer types": (
        "gemma2",
        sizes(20, 4, 4, 6, 3, attn_logit_softcapping=1.5, final_logit_softcapping=None, attention_bias=True,
              layer_types=[FULL, FULL, SLIDING], sliding_window=3),
    ),
    "gemma3_text/two ropes": (
        "gemma3_text",
        sizes(layers=3, query_pre_attn_scalar=7, sliding_window=5, layer_types=[SLIDING, SLIDING, FULL])
        | {"rope_parameters": GEMMA3_ROPES},
    ),
    "gemma3_text/by the pattern": (
        "gemma3_text",
        sizes(32, 4, 2, 8, 7, query_pre_attn_scalar=16, sliding_window=4, tie_word_embeddings=False)
        | {"rope_parameters": GEMMA3_ROPES},
    ),
    "gemma3_text/all full, biases, cap": (
        "gemma3_text",
        sizes(20, 4, 4, 6, layer_types=[FULL, FULL], attention_bias=True, query_pre_attn_scalar=5)
        | {"rope_parameters": GEMMA3_ROPES, "final_logit_softcapping": 2.0},
    ),
    "phi3/fused": ("phi3", sizes(24, 3, 1, 8)),
    "phi3/longrope": ("phi3", sizes(32, 4, 2, 8, rope=LONGROPE, original_max_position_embeddings=8)),
    "phi3/part of a head, window": (
        "phi3", sizes(32, 2, 2, 16, 3, rope=PLAIN | {"partial_rotary_factor": 0.75}, sliding_window=5),
    ),
    "olmo2/one kv head": ("olmo2", sizes(30, 3, 1, 10)),
    "olmo2/biases, tied": ("olmo2", sizes(32, 4, 4, 8, attention_bias=True, tie_word_embeddings=True, theta=5e5)),
    "olmo2/grouped, scaled": ("olmo2", sizes(24, 6, 2, 4, 3, rope=LLAMA3)),
    "smollm3/some layers have no positions": ("smollm3", sizes(layers=4, no_rope_layers=[1, 0, 1, 0], theta=5e5)),
    "smollm3/by the interval": ("smollm3", sizes(32, 4, 2, 8, 5, tie_word_embeddings=False)),
    "smollm3/biases, all layers": (
        "smollm3", sizes(20, 4, 4, 6, attention_bias=True, mlp_bias=True, no_rope_layers=[1, 1]),
    ),
    "ernie4_5/interleaved": ("ernie4_5", sizes(theta=5e5)),
    "ernie4_5/biases, untied": ("ernie4_5", sizes(32, 4, 2, 8, use_bias=True, tie_word_embeddings=False)),
    "ernie4_5/all kv heads": ("ernie4_5", sizes(20, 4, 4, 6, 3)),
    "mixtral/four experts": ("mixtral", sizes(num_local_experts=4, num_experts_per_tok=2, theta=5e5)),
    "mixtral/window, tied, one of three": (
        "mixtral",
        sizes(20, 6, 2, 4, 3, num_local_experts=3, num_experts_per_tok=1, sliding_window=4, tie_word_embeddings=True),
    ),
    "mixtral/all experts, gelu": (
        "mixtral", sizes(32, 4, 4, 8, num_local_experts=3, num_experts_per_tok=3, hidden_act="gelu", rope=YARN),
    ),
    "qwen3_moe/dense between, by the interval": (
        "qwen3_moe",
        sizes(layers=4, decoder_sparse_step=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=14,
              norm_topk_prob=True),
    ),
    "qwen3_moe/shares not of one, biases, window": (
        "qwen3_moe",
        sizes(20, 6, 2, 4, 3, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=10, norm_topk_prob=False,
              mlp_only_layers=[0], attention_bias=True, use_sliding_window=True, sliding_window=3),
    ),
    "qwen3_moe/one expert a token, tied": (
        "qwen3_moe",
        sizes(32, 4, 4, 8, num_experts=7, num_experts_per_tok=1, moe_intermediate_size=12, norm_topk_prob=False,
              tie_word_embeddings=True, rope=LLAMA3),
    ),
    "ernie4_5_moe/shared, dense first": (
        "ernie4_5_moe",
        sizes(layers=3, moe_num_experts=5, moe_k=2, moe_intermediate_size=14, moe_num_shared_experts=2),
    ),
    "ernie4_5_moe/none shared, by the interval, untied": (
        "ernie4_5_moe",
        sizes(32, 4, 2, 8, 5, moe_num_experts=6, moe_k=3, moe_intermediate_size=10, moe_num_shared_experts=0,
              moe_layer_start_index=1, moe_layer_end_index=4, moe_layer_interval=2, tie_word_embeddings=False),
    ),
    "ernie4_5_moe/all layers, a floor of the sum": (
        "ernie4_5_moe",
        sizes(20, 4, 4, 6, 2, moe_num_experts=8, moe_k=2, moe_intermediate_size=12, moe_num_shared_experts=1,
              moe_layer_start_index=0, moe_norm_min=0.7),
    ),
    "gpt2/plain": ("gpt2", gpt2()),
    "gpt2/scaled by layer, inner": (
        "gpt2", gpt2(32, 4, n_inner=26, scale_attn_by_inverse_layer_idx=True, n_layer=3),
    ),
    "gpt2/gelu, untied": ("gpt2", gpt2(20, 2, activation_function="gelu", tie_word_embeddings=False)),
}  # fmt: skip
