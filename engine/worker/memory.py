"""How many KV blocks a rank has room for: the cgroup's or machine's memory on CPUs, the GPU's own there.

Knows nothing of requests; the worker asks once, after the weights are loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import CapacityError

GIB = 1 << 30
#: Share of a CPU's free memory that KV may take when --kv-cache-memory does not say: the rest is for
#: activations, other ranks' buffers and the page cache that holds the checkpoint.
CPU_SHARE = 0.5


def kv_blocks(
    config: EngineConfig, block_bytes: int, blocks_of_full_rows: int, world: int, device: torch.device
) -> int:
    """KV blocks of this rank, null block included.

    `blocks_of_full_rows` is what max_num_seqs rows of full length can ever use; a CPU rank takes no
    more by itself. Raises CapacityError when not one block fits beside the null block.
    """
    if config.num_kv_blocks is not None:
        blocks, source = config.num_kv_blocks, "--num-kv-blocks"
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * config.gpu_memory_utilization) - (total - free)
        blocks, source = room // block_bytes, f"--gpu-memory-utilization {config.gpu_memory_utilization}"
    elif config.kv_cache_memory is not None:
        blocks = int(config.kv_cache_memory * GIB) // block_bytes
        source = f"--kv-cache-memory {config.kv_cache_memory}"
    else:
        room = int(available_memory() * CPU_SHARE) // world
        blocks, source = min(room // block_bytes, blocks_of_full_rows + 1), "the memory that is free"
    if blocks < 2:
        raise CapacityError(
            f"There is no room for one KV block of {block_bytes / GIB:.6f} GiB ({config.block_size} tokens) "
            f"beside the null block: {source} leaves {max(blocks, 0)}. Give it at least "
            f"{2 * block_bytes / GIB:.6f} GiB, lower --block-size, or use more ranks."
        )
    return blocks


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or less where a cgroup v2 limits it."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)
