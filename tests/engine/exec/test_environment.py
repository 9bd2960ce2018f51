"""Ranks see the user's tuning of libraries, and nothing of the driver's node, process or secrets."""

from engine.exec.environment import adopt, for_ranks


def test_only_allowed_names_travel() -> None:
    environ = {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "3", "HF_HUB_OFFLINE": "1",
        "TORCH_LOGS": "x", "CUDA_LAUNCH_BLOCKING": "1", "HEADRACE_LOG": "debug",
        "CUDA_VISIBLE_DEVICES": "0", "NCCL_ASYNC_ERROR_HANDLING": "1", "HEADRACE_PARENT_PID": "1",
        "HEADRACE_REDIS": "redis://:secret@x", "HIP_VISIBLE_DEVICES": "0", "HF_VISIBLE_DEVICES": "0",
        "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "s", "RAY_ADDRESS": "x", "LOCAL_RANK": "0",
    }  # fmt: skip
    assert set(for_ranks(environ)) == {
        "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TORCH_LOGS",
        "CUDA_LAUNCH_BLOCKING", "HEADRACE_LOG",
    }  # fmt: skip


def test_what_a_node_has_set_itself_stays_but_for_rays_own() -> None:
    own = {"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "1"}
    adopt(own, {"NCCL_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO"})
    assert own == {"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO"}
