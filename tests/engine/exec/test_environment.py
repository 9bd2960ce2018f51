"""Ranks see the user's tuning of libraries, and nothing of the driver's node or process."""

from engine.exec.environment import for_ranks


def test_only_allowed_names_travel() -> None:
    environ = {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "3", "HF_HUB_OFFLINE": "1",
        "TORCH_LOGS": "x", "CUDA_LAUNCH_BLOCKING": "1", "HEADRACE_REDIS": "redis://x",
        "CUDA_VISIBLE_DEVICES": "0", "NCCL_ASYNC_ERROR_HANDLING": "1", "HEADRACE_PARENT_PID": "1",
        "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "s", "RAY_ADDRESS": "x", "LOCAL_RANK": "0",
    }  # fmt: skip
    assert set(for_ranks(environ)) == {
        "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TORCH_LOGS",
        "CUDA_LAUNCH_BLOCKING", "HEADRACE_REDIS",
    }  # fmt: skip
