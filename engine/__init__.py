"""The long-lived engine: scheduler, KV cache, tensor-parallel workers, models.

Below `engine.service` nothing knows Redis: the core imports torch, numpy, safetensors, transformers
(tokenizers), msgpack and the standard library, so it runs on a bare GPU machine.
"""
