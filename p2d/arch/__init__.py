"""Model families: one spec each. The table is text, so that listing the families imports neither torch nor a spec."""

ARCHS = {
    "gemma3_text": "p2d.arch.gemma3:GEMMA3_TEXT",
    "gpt2": "p2d.arch.gpt2:GPT2",
    "gpt_neox": "p2d.arch.gpt_neox:GPT_NEOX",
    "llama": "p2d.arch.llama:LLAMA",
    "mistral": "p2d.arch.mistral:MISTRAL",
    "olmo2": "p2d.arch.olmo2:OLMO2",
    "phi3": "p2d.arch.phi3:PHI3",
    "qwen2": "p2d.arch.qwen2:QWEN2",
    "qwen3": "p2d.arch.qwen3:QWEN3",
    "smollm3": "p2d.arch.smollm3:SMOLLM3",
}
"""`model_type` of the model's config.json -> its ArchSpec."""
