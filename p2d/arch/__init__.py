"""Model families: one spec each. The table is text, so that listing the families imports neither torch nor a spec."""

ARCHS = {"llama": "p2d.arch.llama:LLAMA"}
"""`model_type` of the model's config.json -> its ArchSpec."""
