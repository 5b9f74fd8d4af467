"""A teacher family as a stranger would add it: Llama's layers under names of its own, with norms of q and k."""

from radlads_jax.porting.families.family import Family, no_biases

FAMILY = Family(
    "tern",
    "TernForCausalLM",
    max_positions=64,
    kv_heads=2,
    qk_norm=True,
    biases=no_biases,
    refused=lambda values: ["tern_wings (more than two)"] if values.get("tern_wings", 2) > 2 else [],
    keys=lambda cfg: {"tern_wings": 2},
    disk_name=lambda name: name.replace("model.layers.", "tern.blocks.").replace("model.", "tern."),
)
