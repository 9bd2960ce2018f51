"""One rank: device, weights, KV cache, permanent rows, and the step."""
