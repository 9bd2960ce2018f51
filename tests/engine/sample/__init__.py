"""The sampler against plain full-vocabulary references, alone, among neighbours and over ranks."""
