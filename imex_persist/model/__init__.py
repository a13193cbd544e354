"""From a model's files to what the kernel reads: configuration, weights, packing, tokenizer, and the NumPy reference.

Imports go one way: `bf16`, `config` < `rope`, `weights` < sources (`safetensors`, `gguf`, `dummy`) < `shard` < `packing`,
`reference`; `locate` < `load`.
"""
